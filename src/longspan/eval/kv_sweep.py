"""What is measured of policies at a budget: which figures there are, and for which of them.

once          the next tokens of a text, scored in one pass over what was kept
steps         the same one by one, and the policy goes on deciding
TASK          the share of answers that greedy generation gives
TASK later    the same where the policy decided before the question came
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longspan.errors import InputError
from longspan.eval.kv_forms import Form, check_budget
from longspan.eval.ruler import check_tasks
from longspan.eval.seed import check_seed

DENSE = Form(name="dense", template="everything()")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure.

    Attributes:
        forms: policies of the cache and methods for the prompt.
        budgets: shares of the prompt, rising.
        length: tokens of a prompt; of questions at most so many.
        new: tokens scored in one pass behind a text; 0: none.
        steps: tokens scored one by one; 0: none.
        tasks: names of ``longspan.eval.ruler.TASKS``.
        later: also ask after the policy has decided.
        samples: texts, and questions of each task.
        batch: prompts read together.
        answer: most tokens of an answer; None: the task's own number.
        seed: chooses what questions say.
    """

    forms: tuple[Form, ...]
    budgets: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    length: int = 1024
    new: int = 128
    steps: int = 32
    tasks: tuple[str, ...] = ("passkey", "niah.single")
    later: bool = True
    samples: int = 4
    batch: int = 4
    answer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.tasks:
            check_tasks(self.tasks)
        if not self.budgets or not all(0 < share <= 1 for share in self.budgets):
            raise InputError(
                "Budgets are percents of the prompt above 0 and up to 100, got "
                f"{', '.join(f'{share * 100:g}' for share in self.budgets) or 'none'}."
            )
        whole = {"samples": self.samples, "batch": self.batch, "answer tokens": self.answer or 1}
        if min(whole.values()) < 1 or self.answer == 0 or self.length < 2:
            raise InputError(
                f"A length from 2 and numbers from 1 are needed, got length {self.length} and "
                f"{', '.join(f'{name} {value}' for name, value in whole.items())}."
            )
        if min(self.new, self.steps) < 0 or 1 in (self.new, self.steps):
            raise InputError(
                "The first token behind a prompt does not depend on what was kept: score 2 or "
                f"more, or 0 for none; got {self.new} at once and {self.steps} one by one."
            )
        if not (self.texts or self.tasks):
            raise InputError("Nothing is measured without new tokens, steps or tasks.")
        if self.forms:
            check_budget(min(self.budgets), self.length)
        for form in self.forms:
            # One that no budget is enough for says why.
            form.at(max(self.budgets), self.length)

    @property
    def texts(self) -> bool:
        """Whether perplexity is measured, which needs text."""
        return self.new > 0 or self.steps > 0

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of all figures."""
        asked = [m for task in self.tasks for m in (task, f"{task} later")[: 1 + self.later]]
        return (*(("once",) * (self.new > 0)), *(("steps",) * (self.steps > 0)), *asked)

    def settings(self) -> dict[str, Any]:
        """All that a single figure depends on; what is measured may grow later."""
        plain = asdict(self)
        for grows in ("forms", "budgets", "tasks", "later"):
            del plain[grows]
        return plain

    def cells(self) -> list[Cell]:
        """Everything to measure, in the order in which prompts are read.

        A budget below the least of a policy, as two of Quest's pages, has no figure.
        """
        found = []
        starts = range(0, self.samples, self.batch)
        for source in (*(("text",) * self.texts), *self.tasks):
            of_source = [m for m in self.measures if source_of(m) == source]
            for start in starts:
                for form in (DENSE, *self.forms):
                    for share in (1.0,) if form is DENSE else self.budgets:
                        if not form.fits(share, self.length):
                            continue
                        found += [
                            Cell(measure=measure, start=start, form=form, share=share)
                            for measure in of_source
                            if _applies(form, measure)
                        ]
        return found


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure: of one batch of prompts, one policy or method and one budget."""

    measure: str
    start: int
    form: Form
    share: float

    @property
    def key(self) -> str:
        """In the records."""
        return f"{self.measure}/{self.start}/{self.form.key}/{self.share:g}"


def source_of(measure: str) -> str:
    """Whose prompts a figure needs: ``text`` or those of a task."""
    return "text" if measure in ("once", "steps") else measure.removesuffix(" later")


def _applies(form: Form, measure: str) -> bool:
    if form.prefill:
        return measure != "steps" and not measure.endswith(" later")
    # What forgets nothing, as Quest, only differs where tokens are read one by one.
    return measure != "once" or form is DENSE or form.at(0.5, 4096).evicts
