"""The allocator's expandable segments: on unless the user says otherwise, and what they save where texts vary."""

import pytest

START = """
import logging
import torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from minigpt4.common.dist_utils import start_processes
start_processes("cuda")
tensors = [torch.zeros(mib << 20, device="cuda") for mib in (1, 3, 30)]
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
"""
OLD = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        (OLD, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ({"MOCK_CUDA_MAPS": "0"}, False),
    ],
    ids=["default", "switched off", "other settings of the user", "a driver that maps no memory"],
)
def test_segments_expand_unless_the_user_or_the_driver_does_not_want_it(mock_gpu, tmp_path, variables, expected):
    script = tmp_path / "start.py"
    script.write_text(START)
    done = mock_gpu(script, **variables)
    assert f"{{{expected}}}" in done.stdout
    assert ("cannot expand segments" in done.stderr) == ("MOCK_CUDA_MAPS" in variables)
    assert "Warning" not in done.stderr


def test_texts_of_all_lengths_leave_gaps_in_fixed_segments_alone(gpu_step):
    gaps = []
    for variables in ({}, OLD):
        arguments = ("--vary", "--batch", "8", "--steps", "8")
        result = gpu_step("minigpt4_stage2_finetune", *arguments, MOCK_CUDA_GIB="79", FREE_STEPS="9", **variables)
        gaps.append(result["reserved_gib"] - result["allocated_gib"])
    assert gaps[1] > max(1.5, 3 * gaps[0])
