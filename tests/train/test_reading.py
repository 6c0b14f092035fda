"""What a whole run reads: the same samples on other ranks after a resume, and while reading processes are lost."""

from __future__ import annotations

from pathlib import Path

from i2i_dist.data.reader import micro_batches
from i2i_dist.data.transforms import Transform
from tests.data.builders import reader_of
from tests.ranks import free_port, rank_environment
from tests.train.hooks import sample_lines
from tests.train.runs import finish, settings, start


def test_a_resumed_run_reads_on_where_it_was_although_its_reading_processes_are_lost(
    dclgan: Path, data: Path, tmp_path: Path
) -> None:
    """Eight updates on two ranks, then sixteen on one; there a reading process is killed, and another one hangs."""
    words = ["--config", str(dclgan), "--run", str(tmp_path / "run")]
    port, noted = free_port(), [tmp_path / name for name in ("first", "second", "resumed")]
    ranks = [
        start(
            [*words, *settings(schedule__constant_epochs=2, data__workers=rank)],
            tmp_path / f"log.{rank}",
            rank_environment(rank, 2, port) | {"SAMPLES": str(noted[rank])},
            hook="samples_are_noted",
        )
        for rank in range(2)
    ]
    codes, texts = finish(ranks)
    assert codes == [0, 0], texts

    more = settings(
        schedule__constant_epochs=6, data__workers=2, data__worker_timeout_seconds=2, output__metrics_port=port
    )
    page = tmp_path / "page"
    environment = {"SAMPLES": str(noted[2]), "PORT": str(port), "PAGE": str(page)}
    resumed = start([*words, *more], tmp_path / "log", environment, hook="reading_processes_are_lost")
    assert resumed.wait() == 0, resumed.text
    resumed.wait_until_gone()
    assert "was killed by SIGKILL" in resumed.text and "gave nothing for 2 s" in resumed.text
    assert "Traceback" not in resumed.text
    assert "i2i_data_worker_restarts_total 2.0" in page.read_text()

    transform = Transform(load_size=36, crop_size=32, flip=True, full_size_from=48)
    whole = micro_batches(
        reader_of(data, seed=0, transform=transform),
        global_batch=2, micro_batch=2, rank=0, world=1, start=0, stop=48, workers=0,
    )  # fmt: skip
    expected = [line for host in whole for line in sample_lines(host)]
    first, second, rest = (path.read_text().splitlines(keepends=True) for path in noted)
    assert [line for pair in zip(first, second, strict=True) for line in pair] == expected[:16]
    assert rest == expected[16:]
