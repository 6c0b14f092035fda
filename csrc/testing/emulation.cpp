// The scheduler of the emulation: fibres, their barriers, and the block's shared memory.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace i2i {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 16 * 1024;  // on both sides of the shared memory
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxShared = 227 * 1024;

enum class State { kReady, kAtWarp, kAtBlock, kEnded };

// One thread of the block. It is started once and then runs the same loop for every block of every launch.
struct Fibre {
  ucontext_t start;
  jmp_buf position;
  bool started = false;
  State state = State::kEnded;
  Site site;                // where it waits
  void* operand = nullptr;  // what it brought there
  void (*perform)(Operands) = nullptr;
};

[[noreturn]] void run_fibre();

struct Warp {
  int live, waiting;  // lanes
};

// Stacks that end with a page nobody may touch, so that an overflow does not pass in silence.
class Stack {
 public:
  Stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bytes_ == MAP_FAILED || mprotect(bytes_, page, PROT_NONE) != 0) throw Error("no memory for fibres");
  }
  ~Stack() { munmap(bytes_, kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* bytes() const { return bytes_; }

 private:
  void* bytes_;
};

class Machine {
 public:
  void set_seed(uint64_t seed) { random_.seed(seed); }
  void run(const Grid& grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
  void wait_for_block(Site site);
  void wait_for_warp(Site site, void* operand, void (*perform)(Operands));
  [[noreturn]] void live();

  int current() const { return current_; }
  const std::string& launch() const { return launch_; }
  unsigned char* shared() { return shared_begin_; }
  size_t shared_bytes() const { return shared_bytes_; }

 private:
  void check_limits(const Grid& grid, dim3 block, size_t shared_bytes) const;
  void run_block();
  void visit(int warp);
  void resume(int number);
  void suspend();
  void end();
  bool perform_if_complete(int warp);
  void poison_shared();
  void check_guards() const;
  int warps() const { return static_cast<int>(warps_.size()); }
  int warp_end(int warp) const { return std::min(threads_, (warp + 1) * kWarp); }
  bool is_ready(int warp) const;
  size_t random(size_t count) { return random_() % count; }
  [[noreturn]] void fail_apart(const Site& one, const Site& other) const;
  [[noreturn]] void report_deadlock() const;

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Fibre> fibres_;
  std::vector<Warp> warps_;
  jmp_buf scheduler_;
  const std::function<void()>* thread_ = nullptr;
  std::exception_ptr error_;
  bool given_up_ = false;
  std::string launch_;
  int threads_ = 0, current_ = 0, ended_ = 0, at_block_ = 0;
  std::vector<unsigned char> shared_;
  unsigned char* shared_begin_ = nullptr;
  size_t shared_bytes_ = 0;
};

// One launch at a time; not freed, as fibres live until the process ends.
Machine& machine() {
  static Machine& only = *new Machine;
  return only;
}
std::mutex launching;

std::string name(const Site& site) {
  std::ostringstream text;
  text << site.what;
  if (site.line != 0) text << " (" << site.file << ":" << site.line << ")";
  return text.str();
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(const Site& a, const Site& b) { return a.line == b.line && same(a.what, b.what) && same(a.file, b.file); }

void run_fibre() { machine().live(); }

void Machine::check_limits(const Grid& grid, dim3 block, size_t shared_bytes) const {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) fail("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > kMaxGridYZ || grid.z == 0 || grid.z > kMaxGridYZ)
    fail("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  if (shared_bytes > kMaxShared) fail(std::to_string(shared_bytes) + " bytes of shared memory");
}

void Machine::run(const Grid& grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  launch_ = name(grid.site);
  check_limits(grid, block, shared_bytes);
  threads_ = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(stacks_.size()) < threads_) stacks_.push_back(std::make_unique<Stack>());
  // After an error the fibres are given up where they stand: they hold nothing but numbers.
  if (given_up_ || static_cast<int>(fibres_.size()) < threads_) fibres_.assign(stacks_.size(), Fibre{});
  given_up_ = true;
  thread_ = &thread;
  blockDim = block;
  gridDim = grid;
  shared_bytes_ = shared_bytes;
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (size_t left = blocks.size(); left > 1; left--) std::swap(blocks[left - 1], blocks[random(left)]);
  for (const uint64_t number : blocks) {
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    run_block();
  }
  given_up_ = false;
}

void Machine::run_block() {
  poison_shared();
  forget_copies(threads_);
  ended_ = at_block_ = 0;
  for (int number = 0; number < threads_; number++) fibres_[number].state = State::kReady;
  warps_.resize((threads_ + kWarp - 1) / kWarp);
  for (int warp = 0; warp < warps(); warp++) warps_[warp] = {warp_end(warp) - warp * kWarp, 0};
  while (ended_ < threads_) {
    std::vector<int> ready;
    for (int warp = 0; warp < warps(); warp++)
      if (is_ready(warp)) ready.push_back(warp);
    if (ready.empty()) report_deadlock();
    // Now and then one warp runs as far as it can, so that barriers that only luck makes needless are missed.
    const int warp = ready[random(ready.size())];
    const bool to_the_end = random(4) == 0;
    do visit(warp);
    while (to_the_end && is_ready(warp));
  }
  check_guards();
}

bool Machine::is_ready(int warp) const {
  for (int number = warp * kWarp; number < warp_end(warp); number++)
    if (fibres_[number].state == State::kReady) return true;
  return false;
}

// Lets every lane of the warp that can run on, from a random one, upwards or downwards.
void Machine::visit(int warp) {
  const int first = warp * kWarp, lanes = warp_end(warp) - first;
  const int start = static_cast<int>(random(lanes)), step = random(2) == 0 ? 1 : lanes - 1;
  for (int i = 0; i < lanes; i++) {
    const int number = first + (start + i * step) % lanes;
    if (fibres_[number].state == State::kReady) resume(number);
  }
}

void Machine::resume(int number) {
  Fibre& fibre = fibres_[number];
  current_ = number;
  const unsigned index = static_cast<unsigned>(number);
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  if (_setjmp(scheduler_) == 0) {
    if (fibre.started) _longjmp(fibre.position, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = stacks_[number]->bytes();
    fibre.start.uc_stack.ss_size = kStackBytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, run_fibre, 0);
    setcontext(&fibre.start);
  }
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Machine::suspend() {
  if (_setjmp(fibres_[current_].position) == 0) _longjmp(scheduler_, 1);
}

// A fibre's whole life: one thread after the other.
void Machine::live() {
  while (true) {
    try {
      (*thread_)();
      end();
    } catch (...) {
      error_ = std::current_exception();
    }
    suspend();
  }
}

void Machine::end() {
  fibres_[current_].state = State::kEnded;
  ended_++;
  warps_[current_ / kWarp].live--;
  perform_if_complete(current_ / kWarp);
}

void Machine::wait_for_block(Site site) {
  Fibre& mine = fibres_[current_];
  mine.site = site;
  mine.state = State::kAtBlock;
  if (++at_block_ < threads_) return suspend();
  at_block_ = 0;
  for (int number = 0; number < threads_; number++) {
    if (!same(fibres_[number].site, site)) fail_apart(site, fibres_[number].site);
    fibres_[number].state = State::kReady;
  }
}

void Machine::wait_for_warp(Site site, void* operand, void (*perform)(Operands)) {
  Fibre& mine = fibres_[current_];
  mine.site = site;
  mine.operand = operand;
  mine.perform = perform;
  mine.state = State::kAtWarp;
  warps_[current_ / kWarp].waiting++;
  if (!perform_if_complete(current_ / kWarp)) suspend();
}

// Performs the collective that all live lanes of the warp wait for, if they do.
bool Machine::perform_if_complete(int warp) {
  if (warps_[warp].waiting == 0 || warps_[warp].waiting < warps_[warp].live) return false;
  warps_[warp].waiting = 0;
  void* operands[kWarp] = {};
  const Fibre* last = nullptr;
  for (int number = warp * kWarp; number < warp_end(warp); number++) {
    Fibre& fibre = fibres_[number];
    if (fibre.state == State::kEnded) continue;
    if (last != nullptr && !same(fibre.site, last->site)) fail_apart(fibre.site, last->site);
    operands[number % kWarp] = fibre.operand;
    fibre.state = State::kReady;
    last = &fibre;
  }
  last->perform(operands);
  return true;
}

void Machine::fail_apart(const Site& one, const Site& other) const {
  fail("some threads wait at " + name(one) + ", others at " + name(other));
}

void Machine::report_deadlock() const {
  std::map<std::string, int> waiting;
  for (int number = 0; number < threads_; number++)
    if (fibres_[number].state != State::kEnded) waiting[name(fibres_[number].site)]++;
  std::ostringstream text;
  text << "no thread of block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") can go on: " << ended_
       << " of " << threads_ << " threads have ended";
  for (const auto& [place, count] : waiting) text << ", " << count << " wait at " << place;
  fail(text.str());
}

void Machine::poison_shared() {
  constexpr size_t kAlignment = 128;
  shared_.assign(shared_bytes_ + 2 * kGuardBytes + kAlignment, kPoison);
  const auto address = reinterpret_cast<uintptr_t>(shared_.data()) + kGuardBytes;
  shared_begin_ = shared_.data() + kGuardBytes + (kAlignment - address % kAlignment) % kAlignment;
}

void Machine::check_guards() const {
  const size_t before = static_cast<size_t>(shared_begin_ - shared_.data());
  if (!is_poison(shared_.data(), before) ||
      !is_poison(shared_begin_ + shared_bytes_, shared_.size() - before - shared_bytes_))
    fail("a thread wrote outside the " + std::to_string(shared_bytes_) + " bytes of shared memory");
}

}  // namespace

void set_schedule(uint64_t seed, Landing landing) {
  const std::lock_guard<std::mutex> lock(launching);
  machine().set_seed(seed);
  set_landing(landing);
}

void run(const Grid& grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launching);
  machine().run(grid, block, shared_bytes, thread);
}

void block_barrier(Site site) { machine().wait_for_block(site); }

void warp_collective(Site site, void* operand, void (*perform)(Operands)) {
  machine().wait_for_warp(site, operand, perform);
}

bool is_poison(const unsigned char* bytes, size_t count) {
  return count == 0 || (bytes[0] == kPoison && std::memcmp(bytes, bytes + 1, count - 1) == 0);
}

int thread_number() { return machine().current(); }
unsigned char* shared_begin() { return machine().shared(); }
size_t shared_size() { return machine().shared_bytes(); }

void fail(const std::string& sentence) { throw Error("emulated " + machine().launch() + ": " + sentence + "."); }

void check_mask(unsigned mask) {
  if (mask != ~0u) fail("a warp collective with a mask that is not full");
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Operand {
    bool predicate;
    unsigned result;
  };
  check_mask(mask);
  Operand operand{predicate, 0};
  warp_collective(site, &operand, [](Operands operands) {
    unsigned bits = 0;
    for (int lane = 0; lane < kWarp; lane++)
      if (operands[lane] != nullptr && static_cast<Operand*>(operands[lane])->predicate) bits |= 1u << lane;
    for (void* lane : operands)
      if (lane != nullptr) static_cast<Operand*>(lane)->result = bits;
  });
  return operand.result;
}

}  // namespace emulation
}  // namespace i2i
