"""What a run shows on the terminal: the progress bar while it trains, and the words around it."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Self

from recipes._accelerate import tqdm
from recipes.config import RunConfig

SMOOTHING = 0.05


class ProgressBar:
    """A bar over the budget with loss, bits per byte, tokens/s and time left; silent where `shown` is False.

    Args:
        config: gives the budget.
        step: steps behind at the start.
        seconds: wall time behind at the start.
        shown: False on all processes but the main one.
        token_bytes: bytes of text a token stands for, on average.
    """

    def __init__(self, config: RunConfig, *, step: int, seconds: float, shown: bool, token_bytes: float = 1.0) -> None:
        self.config, self.loss = config, math.nan
        self.first = (step, seconds)
        self.rate, self.token_bytes = 0.0, token_bytes
        self.bar = tqdm(
            total=config.steps or round(60 * config.minutes, 1),
            initial=step if config.steps else round(seconds, 1),
            bar_format="{percentage:3.0f}% {bar:12} {desc}",
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
            disable=not shown,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def update(self, *, step: int, seconds: float, tokens: int, loss: float) -> None:
        """After a step: where the run is, the tokens of a step, and the language loss in nats a token."""
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else self.loss + SMOOTHING * (loss - self.loss)
        steps, spent = step - self.first[0], seconds - self.first[1]
        self.rate = steps * tokens / max(spent, 1e-9)
        if self.config.steps:
            left = (self.config.steps - step) * spent / max(steps, 1)
            done = float(step)
        else:
            left = max(60 * self.config.minutes - seconds, 0.0)
            done = seconds
        bits = self.loss / math.log(2) / self.token_bytes
        text = f"loss {self.loss:.3f} · {bits:.3f} bits/byte"  # all of it fits into 80 columns
        self.bar.set_description_str(f"{text} · {self.rate:,.0f} tokens/s · {clock(left)} left", refresh=False)
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if not self.bar.disable:
            self.bar.write(line)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def comparison(model: float, others: dict[str, float], *, count: int, documents: int) -> str:
    """The table of held-out bits per byte, the best first, with bars; what is not a finite number comes last."""
    rows = sorted([("this model", model), *others.items()], key=lambda row: (not math.isfinite(row[1]), row[1]))
    widest = max((value for _, value in rows if math.isfinite(value)), default=1.0)
    lines = [f"Held-out bits per byte ({count:,} bytes of {documents} documents the model was not trained on)"]
    lines += [f"  {name:<10} {value:6.3f}  {_bar(value, widest)}" for name, value in rows]
    return "\n".join(lines)


def _bar(value: float, widest: float) -> str:
    return "█" * max(1, round(40 * value / widest)) if math.isfinite(value) else "not a finite number"
