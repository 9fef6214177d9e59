"""How the manager waits, retries and weighs: every number in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mball.units import GiB, MiB


@dataclass(frozen=True, slots=True)
class Settings:
    """Deadlines in seconds, sizes in bytes.

    `swap_time_share` bounds switching: a stay on the device lasts so long that swapping takes at most this share of
    the time. One that nobody uses need not stay while a device has switching time saved up, `swap_saved_s` at most.
    `max_wait_s` is the age at which the oldest waiter may end another model's stay early.
    `slack_bytes` is what a demoted worker may hold above its idle level without being stopped for it; what it really
    holds is charged to it. `working_bytes` is the least that a model is thought to need beside weights and KV until
    it has been measured. A load from the source that would take longer than `hold_s` goes through an image first, as
    others can switch meanwhile. Rates of arrival are those of the last `rate_window_s` or so.
    Images leave `host_reserve_bytes` of host memory to others (None: by the host's size), looked at every `pressure_s`
    at least, and come back once it was enough for `calm_s`. What a balloon took for others comes back once there was
    room for it for `deflate_s`. A model counts as computing for `active_s` after its last request. Figures are kept
    every `save_s` where there is a folder for them. What others hold of a device is looked at every `foreign_s`,
    the books are checked every `books_s`.
    An image that leaves DRAM is written to the swap store where its files are slower (`auto`), in any case, or never;
    that may take `store_s`, and `hurry_s` where host memory is short.
    """

    max_queue: int = 1024
    queue_timeout_s: float = 600.0
    max_wait_s: float = 15.0
    swap_time_share: float = 0.2
    swap_saved_s: float = 20.0
    min_stay_s: float = 0.0
    max_stay_s: float = 30.0
    hold_s: float = 1.0

    zygote: bool = True
    fork_s: float = 10.0
    start_s: float = 300.0
    promote_s: float = 600.0
    demote_s: float = 60.0
    canary_s: float = 60.0
    drain_s: float = 120.0
    release_s: float = 10.0
    image_s: float = 600.0
    verb_s: float = 10.0
    term_s: float = 5.0
    kill_s: float = 10.0

    start_attempts: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 60.0
    cool_down_s: float = 30.0
    max_starts: int = 2

    slack_bytes: int = 96 * MiB
    working_bytes: int = 64 * MiB
    first_rate: float = 1.0 * GiB
    sample_s: float = 0.25
    idle_sample_s: float = 10.0
    foreign_s: float = 1.0
    books_s: float = 2.0
    rate_window_s: float = 1200.0
    log_bytes: int = 8 * MiB
    host_reserve_bytes: int | None = None
    pressure_s: float = 2.0
    calm_s: float = 10.0
    deflate_s: float = 10.0
    active_s: float = 0.5
    save_s: float = 60.0
    swap_weights: Literal["auto", "always", "never"] = "auto"
    store_s: float = 600.0
    hurry_s: float = 10.0

    def stay_s(self, swap_s: float) -> float:
        """How long a model that took `swap_s` to bring in stays before it may be demoted for another."""
        bound = swap_s * (1 - self.swap_time_share) / self.swap_time_share
        return max(self.min_stay_s, min(bound, self.max_stay_s))
