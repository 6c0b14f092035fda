"""What a run is about to do, said at its start: sizes, spread, length, and the room on the disk."""

from __future__ import annotations

import logging

from i2i_dist import ops, saver
from i2i_dist.assembly import Run
from i2i_dist.config import RunConfig
from i2i_dist.retention import Keep, Room, checkpoint_bytes, free_bytes
from i2i_dist.telemetry.console import Plan, bytes_text, plan_text

_log = logging.getLogger("i2i_dist.plan")


def announce(run: Run) -> None:
    """Print the plan, on rank 0; warn where the disk will not hold the checkpoints."""
    if run.ranks.rank:
        return
    room = _room(run)
    _log.info("%s", plan_text(_plan(run, room)))
    if room.free is not None and not room.fits:
        _log.warning(
            "%d checkpoints of %s will not fit into the %s that are free. One that does not fit is left out, and "
            "training goes on: make room, or lower output.keep_checkpoints or raise output.keep_every_images.",
            room.at_most,
            bytes_text(room.each),
            bytes_text(room.free),
        )


def kept(config: RunConfig) -> Keep:
    """Return which checkpoints of a run stay."""
    return Keep(config.output.keep_checkpoints, config.output.keep_every_images, config.output.keep_best)


def _room(run: Run) -> Room:
    config, crop = run.settings.config, run.settings.config.data.crop_size
    each = checkpoint_bytes(saver.capture(run.sides, run.ema), run.pools, (3, crop, crop), run.ranks.world)
    most = kept(config).at_most(run.target, config.output.checkpoint_every_images)
    return Room(each, most, free_bytes(run.settings.directory / "checkpoints"))


def _plan(run: Run, room: Room) -> Plan:
    networks = {
        name: sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        for side in run.sides.values()
        for name, module in side.module.named_children()
    }
    references = [op for op, kind in ops.implementations(run.device.type).items() if kind == "reference"]
    return Plan(
        method=f"{run.start.config['method']['name']} ({run.start.config['method']['preset']})",
        run_directory=run.settings.directory,
        device=run.device.type,
        nodes=max(1, run.ranks.world // run.ranks.local_world),
        ranks=run.ranks.world,
        micro_batch=run.layout.micro_batch,
        accumulation=run.layout.accumulation,
        parameters=networks,
        images_seen=run.start.images_seen,
        target_images=run.target,
        updates=run.target // run.settings.config.train.global_batch,
        precision=run.layout.precision,
        zero_stages={side: engine.layout.stage for side, engine in run.sides.items()},
        offloaded=[side for side, engine in run.sides.items() if engine.layout.offload],
        recomputed=any(engine.layout.recomputed for engine in run.sides.values()),
        ops_backend=f"native but for {', '.join(references)}" if references else "native",
        checkpoint_bytes=room.each,
        checkpoints_at_most=room.at_most,
        checkpoint_room=room.free,
    )
