"""What the ranks of a group tell each other besides tensors: who has arrived, who has failed.

It goes through the group's store, so that a rank which does not answer can be named; collectives
only say that something went wrong. Exchanges are numbered, and every rank takes part in all of them
in the same order. In each, a rank leaves its status, and the first rank of the group reads all of
them and leaves a verdict for the others: the values of all, or who has failed, or who is missing.
A failure takes the place of a rank's next status, so whoever waits for that status learns of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hesskern.text import counted, listed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["RankError", "Statuses"]

# Seconds between two looks at the store.
_LEAST, _MOST = 2e-4, 0.1
# Seconds that the verdict of a failure is kept for ranks that are there to read it.
_GRACE = 5.0


class RankError(RuntimeError):
    """Another rank of the group has failed, is missing, or has brought something else.

    All ranks raise it, or the error of their own that it tells of.
    """


@dataclass
class Statuses:
    """Numbered exchanges of small values between all ranks of a group.

    Attributes:
        store: of the group.
        rank, size: in the group.
        timeout: seconds after which ranks that have not arrived are called missing.
        done: number of exchanges so far, the same on every rank.
        kept: on the first rank, whether the last exchange is still in the store.
    """

    store: Store
    rank: int
    size: int
    timeout: float
    done: int = 0
    kept: bool = False

    def exchange(
        self,
        what: str,
        value: Any = None,
        failure: str | None = None,
        *,
        wire: bool = False,
        judge: Callable[[list[Any]], Any] | None = None,
        leave: bool = False,
        more: bool = False,
    ) -> Any:
        """What ``judge`` makes, on the first rank, of all ranks' values; or the values.

        Args:
            what: is being done, the same on every rank.
            value: of this rank; what JSON can hold.
            failure: why this rank goes no further; it gets None back, as it has its own error.
            wire: whether the failure is one of sending tensors, behind which a missing rank stands.
            judge: of the values in the order of the ranks.
            leave: whether a failing rank does not wait for the others.
            more: whether tensors are sent next, if nobody has failed. Otherwise the first rank,
                with which the store may end, stays until the others have read its verdict.

        Raises:
            RankError: ranks have failed, are missing, or do something else.
        """
        self.done += 1
        if self.size == 1:
            return judge([value]) if judge and failure is None else [value]
        begin = time.monotonic()
        try:
            self._post({"what": what, "value": value, "failure": failure, "wire": wire})
            if leave and self.rank > 0:
                return None
            if self.rank == 0:
                verdict = self._judge(what, judge, begin, failure is not None and not wire)
                if not leave and ("error" in verdict or not more):
                    read = self._wait_for_readers(verdict, begin)
                    if read and "error" not in verdict:
                        self._clear(self.done)
            else:
                verdict = self._verdict(what, begin)
        except RankError:
            raise
        except RuntimeError as error:
            raise self._no_store(what, error) from error
        if "error" not in verdict:
            return verdict["values"]
        if failure is not None and not wire:
            return None
        raise RankError(verdict["error"])

    def failed_elsewhere(self) -> bool:
        """Whether a rank has failed that the next exchange will tell of."""
        try:
            return self.size > 1 and self.store.check([self._key("failed", self.done + 1)])
        except RuntimeError:
            return False

    def _key(self, name: str | int, exchange: int | None = None) -> str:
        return f"hesskern/{self.done if exchange is None else exchange}/{name}"

    def _post(self, status: dict[str, Any]) -> None:
        self.store.set(self._key(self.rank), json.dumps(status))
        arrived = self.store.add(self._key("arrived"), 1)
        stops = status["failure"] is not None and not status["wire"]
        if stops:
            self.store.set(self._key("failed"), str(self.rank))
        if stops or arrived == self.size:
            self.store.set(self._key("full"), "1")

    def _judge(
        self, what: str, judge: Callable[[list[Any]], Any] | None, begin: float, at_once: bool
    ) -> dict[str, Any]:
        """Waits for all statuses, leaves the verdict, and returns it."""
        there = at_once or self._wait(self._key("full"), begin + self.timeout)
        statuses = self._statuses()
        error = self._error(what, statuses, there)
        # Whoever has failed tells at once; then more are still to come to read it.
        stays = there or error is None
        verdict: dict[str, Any] = {"readers": (self.size if stays else len(statuses)) - 1}
        if error is not None:
            verdict["error"] = error
        else:
            values = [statuses[r]["value"] for r in range(self.size)]
            verdict["values"] = values if judge is None else judge(values)
        self.store.set(self._key("verdict"), json.dumps(verdict))
        if error is None and self.kept:
            # Whoever has come here has read all of the exchange before.
            self._clear(self.done - 1)
        self.kept = True
        return verdict

    def _clear(self, exchange: int) -> None:
        """Leaves nothing of an exchange that all have read: the store may serve another group."""
        for name in (0, "arrived", "full", "verdict", "read", "all read"):
            self.store.delete_key(self._key(name, exchange))
        self.kept = False

    def _statuses(self) -> dict[int, dict[str, Any]]:
        """Of all ranks that have left one, in one request where the store can and all have."""
        keys = [self._key(r) for r in range(self.size)]
        # Not among the methods that torch declares.
        together: bool = self.store.has_extended_api()  # type: ignore[attr-defined]
        if together and self.store.check(keys):
            return dict(enumerate(map(json.loads, self.store.multi_get(keys))))
        present = [r for r, key in enumerate(keys) if self.store.check([key])]
        return {r: json.loads(self.store.get(keys[r])) for r in present}

    def _error(self, what: str, statuses: dict[int, dict[str, Any]], there: bool) -> str | None:
        failed = [r for r, s in statuses.items() if s["failure"] is not None and not s["wire"]]
        if failed:
            return "; ".join(
                f"rank {r} of {self.size} failed in {statuses[r]['what']}: {statuses[r]['failure']}"
                for r in failed
            )
        missing = [r for r in range(self.size) if r not in statuses]
        if not there and missing:
            return self._missing(what, missing)
        broken = [r for r, s in statuses.items() if s["failure"] is not None]
        if broken:
            r = broken[0]
            return f"rank {r} of {self.size} failed in {what}: {statuses[r]['failure']}"
        for r, status in statuses.items():
            if status["what"] != what:
                return (
                    f"the ranks do not do the same: rank {r} of {self.size} is at "
                    f"{status['what']}, rank 0 at {what}"
                )
        return None

    def _missing(self, what: str, missing: list[int]) -> str:
        who = listed([f"rank {r}" for r in missing]) + f" of {self.size}"
        return (
            f"{who} did not get to {what} within the group's timeout of "
            f"{counted(round(self.timeout), 'second')}: "
            f"{'it has' if len(missing) == 1 else 'they have'} ended, hung, or taken longer"
        )

    def _verdict(self, what: str, begin: float) -> dict[str, Any]:
        # The first rank may have come last, and needs a moment to judge.
        if not self._wait(self._key("verdict"), begin + self.timeout + _GRACE / 5):
            missing = [r for r in range(self.size) if not self.store.check([self._key(r)])]
            text = self._missing(what, missing or [0])
            # For those who come later.
            left = {"what": what, "failure": f"it waited in vain: {text}", "wire": False}
            self.store.set(self._key(self.rank), json.dumps(left))
            raise RankError(text)
        verdict: dict[str, Any] = json.loads(self.store.get(self._key("verdict")))
        if "error" not in verdict:
            # The first rank has read it.
            self.store.delete_key(self._key(self.rank))
        if self.store.add(self._key("read"), 1) == verdict["readers"]:
            # The last that this rank asks of the store.
            self.store.set(self._key("all read"), "1")
        return verdict

    def _wait_for_readers(self, verdict: dict[str, Any], begin: float) -> bool:
        """Stays, as the store may end with this process, until the others know; whether they do."""
        if not verdict["readers"]:
            return True
        # Who has not come until now is not waited for once more.
        failed = "error" in verdict and verdict["readers"] == self.size - 1
        until = begin + self.timeout if failed else time.monotonic() + _GRACE
        return self._wait(self._key("all read"), until)

    def _wait(self, key: str, until: float) -> bool:
        """Whether the store has the key before a time.

        Looks again and again, as a wait of the store's own hears no interrupt, and torch warns of
        one that ends without the key.
        """
        begin = time.monotonic()
        while not self.store.check([key]):
            now = time.monotonic()
            if now >= until:
                return False
            # Late by a twentieth of the wait, and no burden for the store if all ranks look.
            pause = max(_LEAST, self.size * _LEAST / 100, (now - begin) / 20)
            time.sleep(min(pause, _MOST, until - now))
        return True

    def _no_store(self, what: str, error: RuntimeError) -> RankError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return RankError(
            f"the group's store did not answer in {what}, so the process that holds it has ended "
            f"(the job's rank 0, or torchrun): {reason}"
        )
