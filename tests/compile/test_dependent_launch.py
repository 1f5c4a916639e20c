"""Programmatic dependent launch: off unless VLMPRUNE_PDL asks for it; then every kernel of a stage waits before it reads."""

import re
import subprocess
import sys

import pytest
import triton

from helpers import offline, resources, slow
from helpers.recording_driver import recording_driver
from vlmprune import env, ops

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no launcher; run with TRITON_INTERPRET=0", allow_module_level=True)

SERIALIZED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
STAGES = [
    (576, ["_row_lse_kernel", "_score_select_kernel", "_gather_tokens_kernel"]),
    (5000, ["_row_lse_kernel", "_score_select_kernel", "_select_columns_kernel", "_gather_tokens_kernel"]),
]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("n, names", STAGES)
def test_launches_ask_for_it_only_if_the_setting_does(n, names, asked, monkeypatch):
    monkeypatch.setattr(env, "PDL", asked)
    query, key, rows, columns = slow.inputs(B=1, H=1, Hkv=1, Sq=1, S=n + 9, D=16, R=1, N=n)
    call = dict(rows=rows, columns=columns)
    with recording_driver(ops=True) as recorder:
        plan = ops.PrunePlan(query, key, [key], keep=9, **call)
        recorder.take()
        plan.run(query, key, [key], **call)
        launches = recorder.take()
    assert [launch.name for launch in launches] == names
    assert [SERIALIZED in launch.attributes for launch in launches] == [asked] * len(names)


@pytest.mark.parametrize("arch, waits", [(90, True), (100, True), (80, False)])
def test_a_kernel_waits_before_its_first_access(arch, waits, monkeypatch):
    """GPUs before sm_90 do not know it: nothing is asked of them."""
    monkeypatch.setattr(env, "PDL", True)
    launches = (resources.launches()[name] for name in ("prune", "prune bf16 GQA 16k"))
    kernels = [kernel for launch in launches for kernel in offline.compile_launches(launch, arch)]
    assert {kernel.name for kernel in kernels} == set(STAGES[1][1])
    for kernel in kernels:
        steps = re.findall(r"griddepcontrol\.\w+|(?:ld|st|atom|red|cp\.async)\S*global", kernel.ptx)
        assert (steps[0] == "griddepcontrol.wait") == waits, kernel.name
        assert steps.count("griddepcontrol.launch_dependents") == waits, kernel.name


def test_the_variable_is_read_once():
    command = [sys.executable, "-P", "-c", "from vlmprune import env; print(env.PDL)"]
    for value, expected in (("1", "True"), ("0", "False")):
        out = subprocess.run(command, env={"VLMPRUNE_PDL": value}, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == expected
