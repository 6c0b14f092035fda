// Every CPU tensor between two stretches of NaN, which must stay as they are.
#include "guarded_allocator.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "emulation.h"

namespace i2i {
namespace emulation {
namespace {

constexpr size_t kGuard = 4096;

struct Block {
  unsigned char* begin;  // of the first guard
  size_t bytes;          // between the guards
};

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{static_cast<unsigned char*>(c10::alloc_cpu(bytes + 2 * kGuard)), bytes};
    std::memset(block->begin, kPoison, bytes + 2 * kGuard);
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.insert(block);
    return {block->begin + kGuard, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  // Whether the guards of all blocks since the last call are intact.
  bool check() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block* block : blocks_) inspect(*block);
    return std::exchange(intact_, true);
  }

 private:
  static void release(void* context);

  // Remembers a guard that was written to, and repairs it, so that it is told once.
  void inspect(const Block& block) {
    for (unsigned char* guard : {block.begin, block.begin + kGuard + block.bytes}) {
      if (is_poison(guard, kGuard)) continue;
      std::memset(guard, kPoison, kGuard);
      intact_ = false;
    }
  }

  std::mutex mutex_;
  std::set<Block*> blocks_;
  bool intact_ = true;
};

// Not freed: tensors may outlive everything else.
GuardedAllocator& guarded() {
  static GuardedAllocator& only = *new GuardedAllocator;
  return only;
}

void GuardedAllocator::release(void* context) {
  auto* block = static_cast<Block*>(context);
  const std::lock_guard<std::mutex> lock(guarded().mutex_);
  guarded().inspect(*block);
  guarded().blocks_.erase(block);
  c10::free_cpu(block->begin);
  delete block;
}

}  // namespace

void guard_memory(bool enable) {
  static c10::Allocator* const own = c10::GetCPUAllocator();
  c10::SetCPUAllocator(enable ? &guarded() : own, /*priority=*/1);
  TORCH_CHECK(enable || guarded().check(), "emulated memory: a kernel wrote outside a tensor.");
}

}  // namespace emulation
}  // namespace i2i
