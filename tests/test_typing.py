"""What a type checker says to users of the library: right uses pass, wrong ones are named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
USE = """
import torch
from delta_transfer import BSS, DELTA, L2SP, L2TWW, AFASpatial, AttentionConfig, Network, channel_attention, tapped
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.methods.base import Batch

source: Network = tapped(torch.nn.Sequential(), head="0", taps=["1"]).freeze()
target: Network = source.with_new_head(num_classes=3, seed=0)
batches = [(torch.zeros(1), torch.zeros(1))]
delta = DELTA(alpha=0.01, attention=AttentionConfig(images=8))
fitted: dict[str, torch.Tensor] = delta.fit(source, batches, num_classes=3)
outputs: dict[str, torch.Tensor] = target(torch.zeros(1))
terms: dict[str, torch.Tensor] = delta.penalty(target, outputs, None)
weights: dict[str, torch.Tensor] = channel_attention(source, batches).weights
AFASpatial(0.1).setup(target, target.map_shapes_on(torch.zeros(1)))
L2SP(scope="all").setup(target)
BSS(k=2)
sgd = torch.optim.SGD(target.parameters())
train_step(TrainState(target, source, sgd, "fp32"), L2TWW(), Batch(torch.zeros(1), torch.zeros(1)))
"""
WRONG = {
    'DELTA(alpha="0.01")': 'Argument "alpha" to "DELTA" has incompatible type "str"; expected "float"',
    'L2SP(scop="all")': 'Unexpected keyword argument "scop" for "L2SP"',
    "delta.fit(source, batches)": 'Missing positional argument "num_classes"',
    "tapped(1, head='fc')": 'Argument 1 to "tapped" has incompatible type "int"; expected',
}


@pytest.mark.slow  # a minute where there is no cache yet
def test_a_type_checker_knows_the_library(tmp_path, pytestconfig):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE + "\n".join(WRONG))
    # Silent: what it says of the library's own code is not its users' concern.
    cache = pytestconfig.cache.mkdir("mypy")  # what is known of torch takes a minute to find out
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", cache, "use.py"]
    environment = {"MYPYPATH": str(SRC), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = re.findall(r"^use.py:(\d+): error: (.*)$", done.stdout, re.M)
    first = USE.count("\n") + 1
    assert [int(line) for line, _ in found] == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for (_, said), expected in zip(found, WRONG.values(), strict=True):
        assert said.startswith(expected)
