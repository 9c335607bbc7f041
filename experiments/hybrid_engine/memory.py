"""GPU memory in use before and after each of 20 rollouts of the hybrid engine: `python memory.py` on a machine with a GPU.

Training memory is stood in for by the actor's weights and 8 GB of other tensors; every rollout draws new weights first.
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch


def main() -> int:
    """2: there is no GPU to look at."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("memory.py measures the memory of a GPU, and torch sees no CUDA device here", file=sys.stderr)
        return 2
    from transformers import OPTConfig, OPTForCausalLM  # here: DeepSpeed, which they bring, has its say about a machine without a GPU

    from rlhf.engines.hybrid import HybridEngine
    from rlhf.settings import RolloutConfig
    from rlhf.types import PromptBatch

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    shape = OPTConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048)
    with device:
        model = OPTForCausalLM(shape).to(torch.bfloat16)
        others = torch.zeros(8, 10**9, dtype=torch.uint8)
    strategy: Any = SimpleNamespace(
        global_rank=0,
        world_size=1,
        root_device=device,
        network=lambda role: SimpleNamespace(model=model),
        gather_objects=lambda value: [value],
        max_over_ranks=lambda values: values,
    )
    rollout = RolloutConfig(
        engine="hybrid_engine", temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64, min_new_tokens=0, micro_batch_size=None,
        recorded_path=None, save_to=None, strict=True, cuda_graphs=True, max_out_tokens=None, release_inference_cache=True,
        pin_parameters=False, tp_gather_partition_size=8, prefill_tokens=16384,
    )  # fmt: skip
    engine = HybridEngine(strategy, rollout, end_id=2, pad_id=1)
    ids = torch.randint(5, 50000, (64, 256), device=device)
    prompts = PromptBatch(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), index=torch.arange(64), texts=[""] * 64)
    torch.cuda.synchronize()
    total = torch.cuda.mem_get_info()[1]
    used = [total - torch.cuda.mem_get_info()[0]]
    for _ in range(20):
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.normal_(std=0.02)
        engine.generate("actor", prompts, samples=1)
        torch.cuda.empty_cache()
        used.append(total - torch.cuda.mem_get_info()[0])
    print(json.dumps({
        "card": torch.cuda.get_device_name(), "others_gb": others.numel() / 1e9, "before_gb": used[0] / 1e9,
        "after_gb": [u / 1e9 for u in used[1:]], "timings": engine.timings, "capture_seconds": engine.capture_seconds,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
