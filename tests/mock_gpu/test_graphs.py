"""CUDA graphs on the mock: what is captured, what is refused, and what a replay costs the host.

A replay does nothing here, as no kernel does. So these tests hold that a pass makes no call that a capture forbids, how
many launches are left, and that the rest of the run is as without; the numbers of a replay only a GPU can show.
"""

import json

PASSES = """
import ctypes, json, logging, threading
import torch
from minigpt4.models import cuda_graph

logging.basicConfig(format="%(message)s")
count, said = ctypes.CDLL(None).mock_graph_count, {}
layer = torch.nn.Linear(8, 8, device="cuda").requires_grad_(False)
encoder = cuda_graph.GraphedEncoder("model.vit_cuda_graph")
images = [torch.zeros(rows, 8, device="cuda") for rows in range(1, 7)]

def call(image):
    before = count(1)
    encoder(layer, image, layer.weight)
    return count(1) - before

with torch.inference_mode():
    said["first shape"] = [call(images[0]) for _ in range(4)]
said["after inference mode"] = call(images[0])
with torch.autocast("cuda", torch.float16):
    said["under autocast"] = call(images[0])
said["every shape"] = [[call(image) for _ in range(4)][-1] for image in images]
layer.weight.data = layer.weight.data.clone()
said["weights moved"] = [call(images[0]) for _ in range(4)]
said["one launch too many"] = count(3)

def allocate():
    inside.wait()
    torch.zeros(1 << 25, device="cuda")  # cudaMalloc
    allocated.set()

def captured_while_another_thread_allocates():
    if torch.cuda.is_current_stream_capturing():
        inside.set()
        assert allocated.wait(30)
    return layer(images[0])

inside, allocated, thread = threading.Event(), threading.Event(), threading.Thread(target=allocate)
thread.start()
device = torch.device("cuda")
encoder.capture(captured_while_another_thread_allocates, device)
thread.join()
said["with another thread"] = encoder.works

def waits():
    result = layer(images[0])
    result.sum().item()
    return result

said["refused"] = [encoder.capture(waits, device) is waits for _ in range(2)]
said["after that"] = [call(images[0]), float(encoder(layer, images[0], layer.weight).sum())]
print(json.dumps(said))
"""


BEAMS = """
import ctypes
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from minigpt4.models.attention import FUSED
from minigpt4.models.base_model import freeze
from minigpt4.models.beam_search import _Beams, _Candidate
from minigpt4.models.cuda_graph import CudaGraphs

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
config._attn_implementation = FUSED
llm = freeze(LlamaForCausalLM(config).cuda())
llm.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[])
count, launches = ctypes.CDLL(None).mock_count, []
with torch.no_grad():
    prompts = torch.zeros(2, 9, 32, device="cuda"), torch.ones(2, 9, device="cuda").long()
    beams = _Beams(llm, *prompts, 5, CudaGraphs("test"))
    for number in range(14):
        rows, before = 10 if number < 11 else 7, count(0)
        beams.select([_Candidate(0.0, 0, False, [1] * (number + 2))] * rows)
        beams.forward()
        launches.append(count(0) - before)
        assert len(beams.logits_NV) == rows
print("launches", *launches)
"""


def test_an_encoder_is_called_by_graphs_and_a_pass_that_waits_is_refused_in_one_line(mock_gpu, tmp_path):
    script = tmp_path / "passes.py"
    script.write_text(PASSES)
    done = mock_gpu(script)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "first shape": [0, 0, 1, 1],
        "after inference mode": 1,
        "under autocast": 1,
        "every shape": [1, 1, 1, 1, 0, 0],
        "weights moved": [0, 0, 1, 1],
        "one launch too many": 0,
        "with another thread": True,
        "refused": [True, True],
        "after that": [0, 0.0],
    }
    assert done.stderr.count("model.vit_cuda_graph: not captured, so the run goes on without (") == 1


def test_a_graph_reads_beams_of_which_some_are_done(mock_gpu, tmp_path):
    script = tmp_path / "beams.py"
    script.write_text(BEAMS)
    done = mock_gpu(script)
    launches = [int(number) for number in done.stdout.split("launches")[1].split()]
    assert max(launches[-5:]) < 20 < min(launches[:9])


def test_the_vision_side_of_a_7b_step_is_one_launch(gpu_step):
    launches = []
    for on in (False, True):
        options = ("--batch", "2", "--steps", "5", "--options", f"model.vit_cuda_graph={on}")
        result = gpu_step("minigpt4_stage1_pretrain", *options, FREE_STEPS="9")
        assert set(result["waits"][3:]) == {0}
        launches.append(result["launches"][-1])
    assert launches[0] - launches[1] > 750
