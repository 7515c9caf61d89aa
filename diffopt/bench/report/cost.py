"""What pictures cost: a price per hour, from the command line, a record or configs/gpus, and the formula."""

import datetime
import math
from collections.abc import Iterable

from diffopt.errors import InputError
from diffopt.gpus import Price, find_gpu

FORMULA = "cost of 1000 images = price per hour / (images per second × 3600) × 1000"


def cost_per_1000(usd_per_hour: float, images_per_s: float) -> float:
    """US dollars for 1000 images (`FORMULA`); both arguments above 0."""
    return usd_per_hour / (images_per_s * 3600) * 1000


def given_price(text: str) -> Price:
    """A price from the command line, dated today.

    Raises:
        InputError: not a number above 0.
    """
    try:
        usd = float(text)
    except ValueError:
        usd = math.nan
    if not (math.isfinite(usd) and usd > 0):
        raise InputError("--price", text, "US dollars per hour are needed, a number above 0, such as 3.99")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Price(usd, today, "given on the command line")


def given_prices(texts: Iterable[str], machines: Iterable[str]) -> dict[str, Price]:
    """Prices by machine from `--price USD`, where there is one machine only, or `--price MACHINE=USD`.

    Raises:
        InputError: not a price, a machine that isn't there, or several machines and none named.
    """
    known = list(machines)
    prices: dict[str, Price] = {}
    for text in texts:
        name, _, usd = text.rpartition("=")
        price = given_price(usd)
        if name not in known and (name or len(known) != 1):
            raise InputError("--price", text, f"name the machine, MACHINE=USD, one of: {', '.join(known) or 'none'}")
        prices[name or known[0]] = price
    return prices


def known_price(gpu: str | None) -> Price | None:
    """From configs/gpus, by the name the driver gives; None for a CPU and where none is known."""
    known = find_gpu(gpu) if gpu is not None else None
    return known.price if known else None
