"""``hesskern reproduce`` on few digits with a small network."""

from click.testing import CliRunner

from hesskern.apps import commands
from hesskern.apps.reproduce.lab import Network, Overrides

F200 = Network("mnist", "f200x2")
TINY = Overrides(data="digits", model="f16x2", limit=200, epochs=2, seeds=2, top=12)
SMALL = "--data digits --model f16x2 --limit 200 --epochs 2 --top 12 --seeds 2".split()
# One of each kind of figure and table; the functions behind all others run below, undrawn.
SHOWN = ["random-data", "overlap-f200x2", "autocorrelation", "correspondence"]
FOLDER = "quick-data-digits-model-f16x2-limit-200-epochs-2"


def run(*arguments):
    return CliRunner().invoke(commands.hesskern, ["reproduce", *map(str, arguments)])


def network(tiny, model="f200x2"):
    return tiny.networks([Network("mnist", model)])[0]
