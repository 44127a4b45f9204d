"""From sentences to a training step without padding, a small language model: `python examples/train_language_model.py`.

The lengths are the one truth: positions, labels and the mask of a packed batch follow from them.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import maskops
from maskops import data

SENTENCES = """the cat sat on the mat
a dog
the dog saw the cat and ran after it through the garden
it rained
nobody saw the cat on the mat again
the garden was quiet""".splitlines()
BOS, EOS, LONGEST, CAPACITY, WIDTH, HEADS = 0, 1, 16, 24, 32, 2


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary)

    def loss(self, batch: data.PackedBatch) -> Tensor:
        plan = batch.spans()  # causal inside each sentence; made once, for any number of layers
        x = self.tokens(batch.input_ids) + self.positions(batch.position_ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(1)  # (total, heads, head_dim)
        x = x + self.out(maskops.varlen_attention(q, k, v, mask=plan).flatten(1))
        x = x + self.mlp(x)
        return maskops.linear_cross_entropy(x, self.head.weight, batch.shift_labels, bias=self.head.bias)


torch.manual_seed(0)
words = {word: number for number, word in enumerate(sorted({w for s in SENTENCES for w in s.split()}), start=2)}
documents = data.prepare([[words[word] for word in s.split()] for s in SENTENCES], bos=BOS, eos=EOS, max_length=LONGEST)
packing = data.pack(documents.lengths, CAPACITY)
collator = data.PackedCollator(CAPACITY)
loader = DataLoader(documents, batch_sampler=data.PackingSampler(packing), collate_fn=collator)
print(documents.report, packing.report(), sep="\n\n")
print("\n", data.padding_report(documents.lengths, batch_size=3, capacity=CAPACITY), sep="")

model = LanguageModel(len(words) + 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(40):
    for batch in loader:
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if epoch in (0, 39):
        print(f"epoch {epoch}: loss {loss.item():.3f}")
