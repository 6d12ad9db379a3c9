"""What DeepSpeed gathers while a micro-batch runs: when, how much, and how much of it is there at a time.

A replay of its `PartitionedParameterCoordinator` (0.19) on the course of a rehearsal, once it knows the
order of modules: it gathers what a module needs, then, at every module, as much of what comes next as a
bucket and the limit on live parameters allow; it lets go of what a module had, unless it has counted on it
for later. A single parameter is gathered in place; several come in one flat buffer, which stays until the
last of them is used, and are copied out of it when the first is. `tests/test_plan.py` holds it against
DeepSpeed itself.

Knows nothing of tensors.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from prefix_ds.plan.marks import Moment
from prefix_ds.plan.rehearsal import Course, Weights


@dataclass(frozen=True)
class Policy:
    """DeepSpeed's settings, in elements."""

    persistence_threshold: int
    prefetch_bucket: int
    max_live: int
    max_reuse_distance: int
    is_staged: bool  # gloo receives into a buffer of its own, and copies

    def persists(self, weights: Weights) -> bool:
        """Whether a parameter, once gathered, stays whole on every rank."""
        return weights.numel <= self.persistence_threshold


@dataclass(frozen=True)
class Gathering:
    """What one micro-batch gathers. What pads uneven shards is not counted."""

    held: tuple[int, ...]  # bytes of gathered parameters at each moment, at most until the next
    num_bytes: int  # that every rank then has; one part in as many as there are ranks was its own
    num_calls: int  # collective calls


def gathering(course: Course, policy: Policy, is_trained: bool) -> Gathering:
    """Of a micro-batch in the middle of a run, among several ranks. `is_trained`: whether the weights are."""
    coordinator = _Coordinator(course.held, course.weights, policy, is_trained)
    backward = (n for n, moment in enumerate(course.moments) if moment.is_fetch and not moment.is_forward)
    turn = next(backward, None)
    coordinator.run(course.moments[:turn])  # the trial at the start, and validations
    coordinator.run(course.moments, knows_order=False)
    for _ in range(2):  # what each leaves behind, the next one finds
        last = coordinator.run(course.moments)
    return last


class _State(Enum):
    AWAY, COMING, HERE = range(3)


@dataclass
class _Call:
    """A collective call: the parameters that come, and those nobody has waited for."""

    coming: set[int]
    flat_bytes: int = 0  # a buffer beside the parameters
    waited: bool = False


@dataclass
class _Coordinator:
    held: Mapping[str, Sequence[int]]
    weights: Sequence[Weights]
    policy: Policy
    is_trained: bool
    state: list[_State] = field(init=False)
    users: list[set[str]] = field(init=False)
    calls: dict[int, _Call] = field(default_factory=dict)
    decided: dict[tuple[str, int], frozenset[int]] = field(default_factory=dict)  # what goes where
    now: int = 0  # bytes gathered
    most: int = 0  # since the last moment
    num_bytes: int = 0
    num_calls: int = 0

    def __post_init__(self) -> None:
        self.state = [_State.HERE if self.policy.persists(w) else _State.AWAY for w in self.weights]
        self.users = [set() for _ in self.weights]

    def run(self, moments: Sequence[Moment], knows_order: bool = True) -> Gathering:
        self.order = [moment.module for moment in moments if moment.is_fetch]
        self.knows_order = knows_order
        self._reset()
        self.num_bytes = self.num_calls = 0
        held = []
        for moment in moments:
            self.most = self.now
            (self._fetch if moment.is_fetch else self._release)(moment)
            held.append(self.most)
        self._let_go_of_the_rest()
        return Gathering(tuple(held), self.num_bytes, self.num_calls)

    def _reset(self) -> None:
        for parameter in list(self.calls):
            self._wait(parameter)
            self._let_go(parameter)
        self.queue = deque(
            (parameter, step)
            for step, module in enumerate(self.order)
            for parameter in sorted(self.held[module])
        )
        self.last_use_seen = [-1] * len(self.weights)
        self.available = self.step = 0
        self.backward: dict[
            str, set[int]
        ] = {}  # modules in their backward pass, and what recomputing them got

    def _fetch(self, moment: Moment) -> None:
        mine = self.held[moment.module]
        if not moment.is_forward:
            self.backward[moment.module] = self.backward.pop(moment.module, set())
        self._gather([p for p in mine if self.state[p] is _State.AWAY])
        for parameter in mine:
            self.users[parameter].add(moment.module)
            if moment.is_repeated and self.backward and not self.is_trained:
                owner = next(reversed(self.backward))
                self.backward[owner].add(parameter)
                self.users[parameter].add(owner)
            if parameter in self.calls:
                self._wait(parameter)
        if self.knows_order:
            self._prefetch(mine)
        self.step += 1

    def _prefetch(self, mine: Sequence[int]) -> None:
        unseen = sum(self.last_use_seen[parameter] < self.step for parameter in mine)
        for _ in range(unseen):
            parameter, step = self.queue.popleft()
            self.last_use_seen[parameter] = step
        most = min(self.policy.max_live - self.available, self.policy.prefetch_bucket)
        coming: dict[int, None] = {}
        count = 0
        while self.queue and count < most:
            parameter, step = self.queue.popleft()
            self.last_use_seen[parameter] = max(self.last_use_seen[parameter], step)
            if self.state[parameter] is _State.AWAY and parameter not in coming:
                coming[parameter] = None
                count += self.weights[parameter].numel
        self._gather(list(coming))

    def _gather(self, parameters: list[int]) -> None:
        if not parameters:
            return
        total = sum(self.weights[p].num_bytes for p in parameters)
        flat = total if len(parameters) > 1 else 0
        call = _Call(set(parameters), flat)
        self._grow(total)
        self.most = max(self.most, self.now + total * self.policy.is_staged)
        self.num_bytes += total
        self.num_calls += len({self.weights[p].itemsize for p in parameters})  # a call a type
        for parameter in parameters:
            self.calls[parameter] = call
            self.state[parameter] = _State.COMING
            self.available += self.weights[parameter].numel

    def _wait(self, parameter: int) -> None:
        call = self.calls.pop(parameter)
        if not call.waited:
            call.waited = True
            for other in call.coming:
                self.state[other] = _State.HERE
            if call.flat_bytes:
                self._grow(sum(self.weights[p].num_bytes for p in call.coming))
        call.coming.discard(parameter)
        if not call.coming:
            self.now -= call.flat_bytes

    def _release(self, moment: Moment) -> None:
        mine = self.held[moment.module]
        going, touched = set(self._going(moment.module)), set(mine)
        if not moment.is_forward:
            repeated = self.backward.pop(moment.module, set())
            going |= {p for p in repeated if not self.policy.persists(self.weights[p])}
            touched |= repeated
        for parameter in touched:
            self.users[parameter].discard(moment.module)
            if parameter in going:
                self._let_go(parameter)

    def _let_go_of_the_rest(self) -> None:
        """Of modules whose backward pass did not end, as nothing below them has a gradient."""
        for module, repeated in self.backward.items():
            for parameter in {*self.held[module], *repeated}:
                self.users[parameter].discard(module)
                if not self.policy.persists(self.weights[parameter]):
                    self._let_go(parameter)

    def _going(self, module: str) -> frozenset[int]:
        """What a module lets go here: all that nobody has counted on for later, as found the first time."""
        mine = frozenset(p for p in self.held[module] if not self.policy.persists(self.weights[p]))
        if not self.knows_order:
            return mine
        counted_on = {p for p in mine if self.last_use_seen[p] > self.step}
        return self.decided.setdefault((module, self.step), mine - counted_on - self._used_soon())

    def _used_soon(self) -> set[int]:
        soon: set[int] = set()
        count = 0
        for module in self.order[self.step :]:
            if count >= self.policy.max_reuse_distance:
                break
            for parameter in self.held[module]:
                soon.add(parameter)
                count += self.weights[parameter].numel
        return soon

    def _let_go(self, parameter: int) -> None:
        if self.state[parameter] is _State.HERE and not self.users[parameter]:
            self.state[parameter] = _State.AWAY
            self.now -= self.weights[parameter].num_bytes
            self.available -= self.weights[parameter].numel

    def _grow(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)
