"""Dates as people write them in English, German and French, with what they mean: `2027-03-09`.

Days are split by their number: one in ten is held out, one in ten more is for tuning, so that no day of these is in
training in any spelling. Years are 1930 to 2029; of two digits are those of that century.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data" / "dates"
FIRST, DAYS = datetime.date(1930, 1, 1), 36525  # a century, its leap days included
PARTS = {"calibration": (256, 1), "heldout": (1000, 2)}  # pairs, seed
TRAINED, TUNED, HELD_OUT = range(8), (8,), (9,)  # last digits of the numbers of the days of each part
VOCAB = 512

ENGLISH = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
GERMAN = [
    "Januar",
    "Februar",
    "März",
    "April",
    "Mai",
    "Juni",
    "Juli",
    "August",
    "September",
    "Oktober",
    "November",
    "Dezember",
]
FRENCH = [
    "janvier",
    "février",
    "mars",
    "avril",
    "mai",
    "juin",
    "juillet",
    "août",
    "septembre",
    "octobre",
    "novembre",
    "décembre",
]
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WOCHE = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
SEMAINE = ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"]
ONES = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
ONES += ["seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TH = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
]
TH += ["fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth"]

Spelling = Callable[[datetime.date], str]


def number(n: int) -> str:
    """A number below 100 in words."""
    if n < 20:
        return ONES[n - 1]
    return TENS[n // 10 - 2] + (f"-{ONES[n % 10 - 1]}" if n % 10 else "")


def nth(n: int) -> str:
    """The number of a day in words, `twenty-third`."""
    if n <= 20:
        return TH[n - 1]
    return "thirtieth" if n == 30 else f"{TENS[n // 10 - 2]}-{TH[n % 10 - 1]}"


def year(n: int) -> str:
    """A year in words, `nineteen eighty-four`, `two thousand and nine`."""
    if 2000 <= n < 2010:
        return "two thousand" + (f" and {number(n - 2000)}" if n > 2000 else "")
    return f"{number(n // 100)} {number(n % 100)}"


def suffix(n: int) -> str:
    """What is written behind the number of a day, `1st`."""
    return "th" if n in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")


SPELLINGS: tuple[Spelling, ...] = (
    lambda d: f"{d.day} {ENGLISH[d.month - 1]} {d.year}",
    lambda d: f"{ENGLISH[d.month - 1]} {d.day}, {d.year}",
    lambda d: f"{ENGLISH[d.month - 1][:3]} {d.day}{suffix(d.day)}, {d.year}",
    lambda d: f"the {d.day}{suffix(d.day)} of {ENGLISH[d.month - 1]} {d.year}",
    lambda d: f"{d.day}-{ENGLISH[d.month - 1][:3].upper()}-{d.year % 100:02}",
    lambda d: f"{WEEK[d.weekday()]}, {ENGLISH[d.month - 1]} {d.day}, {d.year}",
    lambda d: f"{WEEK[d.weekday()][:3]} {d.day} {ENGLISH[d.month - 1][:3]} '{d.year % 100:02}",
    lambda d: f"the {nth(d.day)} of {ENGLISH[d.month - 1]}, {year(d.year)}",
    lambda d: f"{ENGLISH[d.month - 1]} the {nth(d.day)}, {d.year}",
    lambda d: f"{d.month}/{d.day}/{d.year}",
    lambda d: f"{d.month:02}/{d.day:02}/{d.year % 100:02}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year % 100:02}",
    lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
    lambda d: f"{d.day}. {GERMAN[d.month - 1]} {d.year}",
    lambda d: f"{WOCHE[d.weekday()]}, den {d.day}. {GERMAN[d.month - 1]} {d.year}",
    lambda d: f"{d.day}. {GERMAN[d.month - 1][:3]}. {d.year % 100:02}",
    lambda d: f"le {d.day}{'er' if d.day == 1 else ''} {FRENCH[d.month - 1]} {d.year}",
    lambda d: f"{SEMAINE[d.weekday()]} {d.day} {FRENCH[d.month - 1]} {d.year}",
)


def draw(rng: np.random.Generator, digits: range | tuple[int, ...]) -> tuple[str, str]:
    """A date of a part in a random spelling, and what it means."""
    day = int(rng.integers(DAYS // 10)) * 10 + int(rng.choice(list(digits)))
    date = FIRST + datetime.timedelta(day)
    text = SPELLINGS[rng.integers(len(SPELLINGS))](date)
    case = rng.random()
    return text.lower() if case < 0.15 else text.upper() if case < 0.2 else text, date.isoformat()


def pairs(count: int, seed: int, digits: range | tuple[int, ...] = TRAINED) -> Iterator[tuple[str, str]]:
    """Many dates by one seed."""
    rng = np.random.default_rng(seed)
    return (draw(rng, digits) for _ in range(count))


def write(folder: Path = DATA) -> None:
    """Write calibration.jsonl, of days of training, and heldout.jsonl, of days held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (count, seed) in PARTS.items():
        digits = HELD_OUT if name == "heldout" else TRAINED
        lines = [json.dumps({"text": a, "target": b}, ensure_ascii=False) for a, b in pairs(count, seed, digits)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(name: str, folder: Path = DATA) -> list[tuple[str, str]]:
    """The pairs of a part as they are shipped."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["text"], row["target"]) for row in rows]


def tokenizer() -> Tokenizer:
    """Pieces of words by byte-pair encoding, each digit alone; `</s>` ends every text, as T5 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tok.train_from_iterator((text for pair in pairs(20000, 3) for text in pair), trainer)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tok
