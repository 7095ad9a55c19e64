import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "paired_differences.py"


def test_worked_example():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t with 2 degrees of freedom 4.3027."""
    spec = importlib.util.spec_from_file_location("paired_differences", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    differences, mean, (low, high) = module.paired({0: 11.0, 1: 22.0, 2: 33.0, 9: 0.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert differences == [1, 2, 3] and mean == 2
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
