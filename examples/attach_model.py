"""attach: a model of transformers on maskops, one line, proven on the spot, and undone again.

pip install "torch-maskops[integrations]"
python examples/attach_model.py
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma2Config, Gemma2ForCausalLM

import maskops

# A tiny Gemma 2 with random weights: one layer with a window of 4 tokens, one without, both with a softcap.
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
)
model = Gemma2ForCausalLM(config).eval()
documents = [torch.randint(10, 1000, (length,)) for length in (12, 3, 7)]
lengths = torch.tensor([len(document) for document in documents])


@torch.no_grad()
def logits(**inputs: torch.Tensor) -> torch.Tensor:
    """What the model gives for a batch."""
    return model(**inputs).logits


def difference(found: torch.Tensor) -> str:
    """The largest difference from one document at a time."""
    return f"{(found - alone).abs().max().item():.1e}"


alone = torch.cat([logits(input_ids=document[None])[0] for document in documents])

packed = {
    "input_ids": torch.cat(documents)[None],
    "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
}
padded = {
    "input_ids": pad_sequence(documents, batch_first=True),
    "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
}
print(f"packed as transformers takes it: off by {difference(logits(**packed)[0])} from one document at a time")

with maskops.attach(model) as attachment:
    print(f"packed with maskops: largest difference {difference(logits(**packed)[0])}")
    print(f"padded with maskops: largest difference {difference(logits(**padded)[padded['attention_mask'] == 1])}\n")
    print(attachment.report)

print(f"\ndetached: {model.config._attn_implementation} again")
