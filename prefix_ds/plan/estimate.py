"""From a rehearsal to bytes, traffic and seconds of one device in a job.

The peak of a step is looked for along it: at every moment the gathered parameters and what autograd keeps
stand side by side. Time is what the arithmetic, the network and the host's link would each take at a stated
part of their peak; where they overlap, the slowest of them is the step.

Knows nothing of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefix_ds.config import RunConfig
from prefix_ds.devices import Device
from prefix_ds.engine.settings import Settings
from prefix_ds.engine.sizing import sized
from prefix_ds.errors import ConfigError
from prefix_ds.plan.gathering import Gathering, Policy, gathering
from prefix_ds.plan.rehearsal import Course, Rehearsal, Shape, Weights

# Parts of the peak that large products and collective calls reach in practice, and what a GPU's driver and
# libraries take. Assumptions, printed with every plan.
COMPUTE_PART, LINK_PART, RESERVED_BYTES = 0.6, 0.8, 2 * 2**30
_FLOAT = 4  # bytes
_UPDATE = 2  # numbers that AdamW has in hand for each it updates


@dataclass(frozen=True)
class Job:
    """How many devices, and what the data are like."""

    nodes: int
    devices_per_node: int
    example_tokens: int  # mean
    target_part: float  # of all tokens

    @property
    def num_devices(self) -> int:
        """In all."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Step:
    """What a device runs in a step: micro-batches of one shape."""

    shape: Shape
    micro_batches: int
    tokens: int  # of all devices
    most_rows: int  # that a micro-batch may have


@dataclass(frozen=True)
class Traffic:
    """Of one device in a step."""

    gathered_bytes: int  # of weights that all devices put together, its own part included
    received_bytes: int  # over the network or between devices, sums of gradients included
    copied_bytes: int  # from the host
    calls: int  # collective, to gather


@dataclass(frozen=True)
class Estimate:
    """One device in one step."""

    memory: Mapping[str, int]  # bytes at the peak, term by term
    host_bytes: int  # of its shards that lie on the host, in memory or on a disk
    traffic: Traffic
    flops: int
    seconds: Mapping[str, float]  # by what would take them
    tokens: int  # of all devices
    num_layers: int  # that can be computed again

    @property
    def total_bytes(self) -> int:
        """Of the device."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """The slowest, as they overlap."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes that long."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def step_of(config: RunConfig, job: Job, prefix_length: int) -> Step:
    """What the device with the most work runs in a step: its examples, spread over as few micro-batches as
    hold them. Each attends by itself, so that it costs the same in a row of its own and in a packed one."""
    train = config.train
    tokens = min(job.example_tokens, config.data.max_length)
    examples = -(-train.global_batch_size // job.num_devices)
    most = max(1, train.micro_batch_tokens // tokens)
    micro_batches = -(-examples // most)
    at_once = -(-examples // micro_batches)
    targets = max(1, round(at_once * tokens * job.target_part))
    shape = Shape(at_once, tokens, targets, prefix_length)
    return Step(shape, micro_batches, train.global_batch_size * tokens, most)


def policy_of(settings: Mapping[str, Any], device: Device) -> Policy:
    """DeepSpeed's resolved settings, with its defaults where they say nothing."""
    zero = settings["zero_optimization"]
    return Policy(
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
        is_staged=device.kind == "cpu",
    )


def estimate(
    seen: Rehearsal, step: Step, config: RunConfig, settings: Settings, job: Job, device: Device
) -> Estimate:
    """One device in one step."""
    settings = sized(settings, seen.sizes)
    is_full, num_ranks, count = config.train.method != "prefix", job.num_devices, step.micro_batches
    offload = (settings["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
    policy = policy_of(settings, device)
    gathered = _gathered(seen.course, policy, is_full) if num_ranks > 1 or offload else _nothing(seen)
    on_device, on_host = _resident(seen, policy, num_ranks, offload)
    kept, update = _of_all_weights(seen, num_ranks, settings) if is_full else _of_a_prefix(seen, step, config)
    passes = _at_the_peak(seen, gathered)
    most = passes if sum(passes.values()) > update else dict.fromkeys(passes, 0) | {"update": update}
    memory = {"shards": on_device, **most, **kept}
    if device.kind != "cpu":
        memory["driver and libraries"] = RESERVED_BYTES
    others = (num_ranks - 1) / num_ranks
    traffic = Traffic(
        gathered_bytes=gathered.num_bytes * count,
        received_bytes=round(others * (gathered.num_bytes * count + _reduced_bytes(seen, step, is_full))),
        copied_bytes=gathered.num_bytes // num_ranks * count if offload else 0,
        calls=gathered.num_calls * count,
    )
    flops, seconds = seen.flops * count, _times(seen, count, traffic, job, device)
    return Estimate(memory, on_host, traffic, flops, seconds, step.tokens, len(seen.sizes.layers))


def _times(seen: Rehearsal, count: int, traffic: Traffic, job: Job, device: Device) -> dict[str, float]:
    """Seconds of a step of `count` micro-batches, by what takes them."""
    products = seen.flops / (device.tflops * 1e12 * COMPUTE_PART)
    between = "network" if job.nodes > 1 else "links of the node"
    return {
        "arithmetic": (products + _cast_seconds(seen, device)) * count,
        between: _seconds(traffic.received_bytes, _rate(job, device)),
        "link to the host": _seconds(traffic.copied_bytes, device.host_gbs),
    }


def _seconds(num_bytes: int, rate_gbs: float) -> float:
    return num_bytes / (rate_gbs * 1e9 * LINK_PART)


@lru_cache(maxsize=64)
def _gathered(course: Course, policy: Policy, is_trained: bool) -> Gathering:
    return gathering(course, policy, is_trained)


def _nothing(seen: Rehearsal) -> Gathering:
    """One rank's shards are the weights."""
    return Gathering((0,) * len(seen.course.moments), 0, 0)


def _resident(seen: Rehearsal, policy: Policy, num_ranks: int, offload: bool) -> tuple[int, int]:
    """Bytes of weights and buffers between two steps: on the device, and on the host."""
    here = there = 0
    for weights in seen.course.weights:
        shard = _shard_bytes(weights, num_ranks)
        if offload:
            there += shard
        else:
            here += shard
        if policy.persists(weights) and num_ranks > 1:
            here += weights.num_bytes
    return here + seen.buffer_bytes, there


def _shard_bytes(weights: Weights, num_ranks: int) -> int:
    return -(-weights.numel // num_ranks) * weights.itemsize


def _at_the_peak(seen: Rehearsal, gathered: Gathering) -> dict[str, int]:
    both = zip(seen.highest, gathered.held, strict=True)
    alive, held = max(both, key=lambda both: both[0].total + both[1])
    return {"gathered layers": held, "activations": alive.total - alive.logits, "logits": alive.logits}


def _of_a_prefix(seen: Rehearsal, step: Step, config: RunConfig) -> tuple[dict[str, int], int]:
    """What is kept, and what an update takes beside: all in float32, on every rank."""
    width, inner = sum(s.width for s in seen.slots), config.prefix.reparam_dim
    length = step.shape.prefix_length
    table = length * width
    mlp = length * inner + inner * inner + inner + inner * width + width
    trained = mlp if inner else table
    numbers = table + mlp if inner else table  # the MLP is added to a constant
    kept = {"prefix": (numbers + trained) * _FLOAT, "optimizer": 2 * trained * _FLOAT}
    return kept, _UPDATE * trained * _FLOAT


def _of_all_weights(
    seen: Rehearsal, num_ranks: int, settings: Mapping[str, Any]
) -> tuple[dict[str, int], int]:
    """What is kept: gradients in float32 and a bucket; float32 weights and two moments. An update
    takes, of a group of weights at a time, a gradient in float32 beside what AdamW needs."""
    zero = settings["zero_optimization"]
    mine = sum(_shard_bytes(w, num_ranks) // w.itemsize for w in seen.course.weights)
    itemsize = max(w.itemsize for w in seen.course.weights)
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * itemsize
    group = min(mine, int(zero.get("sub_group_size", 1e9)))
    kept = {"gradients": mine * _FLOAT + bucket, "optimizer": 3 * mine * _FLOAT}
    return kept, (1 + _UPDATE) * group * _FLOAT


def _reduced_bytes(seen: Rehearsal, step: Step, is_full: bool) -> int:
    """What ranks exchange to sum gradients: once a step a prefix's, there and back; every micro-batch all
    weights'."""
    if is_full:
        return sum(w.num_bytes for w in seen.course.weights) * step.micro_batches
    return 2 * step.shape.prefix_length * sum(s.width for s in seen.slots) * _FLOAT


def _cast_seconds(seen: Rehearsal, device: Device) -> float:
    """8-bit weights are read and written as 16 bits at every use."""
    course = seen.course
    fetched = [moment.module for moment in course.moments if moment.is_fetch]
    used = [course.weights[n] for module in fetched for n in course.held[module]]
    return 3 * sum(w.numel for w in used if w.itemsize == 1) / (device.memory_gbs * 1e9 * LINK_PART)


def _rate(job: Job, device: Device) -> float:
    """GB/s at which a device receives in a gather: rings over all devices cross the network once a ring."""
    network = device.network_gbs * job.devices_per_node
    return device.node_gbs if job.nodes == 1 else min(device.node_gbs, network)


def check_job(job: Job) -> None:
    """Raises ConfigError for what is no job."""
    for option, value in (
        ("--nodes", job.nodes),
        ("--gpus-per-node", job.devices_per_node),
        ("--example-tokens", job.example_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{option}: {value}: expected at least 1")
    if not 0 < job.target_part <= 1:
        raise ConfigError(f"--targets: {job.target_part}: expected a part of all tokens, above 0 and up to 1")
