"""A method that ends the process it is asked in."""

import os
import sys
from dataclasses import dataclass

from cpbench.case import Case
from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class Deadly(Ulysses):
    def check(self, case: Case) -> None:
        sys.stderr.write("deadly was here\n")
        sys.stderr.flush()
        os._exit(3)


METHOD = Deadly
