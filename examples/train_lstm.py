"""From raw sentences to a training step of an LSTM, which never sees padding: `python examples/train_lstm.py`."""

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
BOS, EOS, WIDTH = 0, 1, 32


class Model(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary)
        self.lstm = nn.LSTM(WIDTH, WIDTH)

    def logits(self, batch: data.PackedBatch) -> Tensor:
        by_time = data.to_packed_sequence(batch, self.tokens(batch.input_ids))  # torch's own PackedSequence
        states, _ = self.lstm(by_time)
        return self.head(data.from_packed_sequence(states, batch))  # (total, vocabulary): a row for each token


torch.manual_seed(0)
words = {word: number for number, word in enumerate(sorted({w for s in SENTENCES for w in s.split()}), start=2)}
documents = data.prepare([[words[word] for word in s.split()] for s in SENTENCES], bos=BOS, eos=EOS)
loader = DataLoader(documents, batch_size=3, shuffle=True, collate_fn=data.PackedCollator())

model = Model(len(words) + 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(30):
    for batch in loader:
        loss = maskops.cross_entropy(model.logits(batch), batch.shift_labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if epoch in (0, 29):
        print(f"epoch {epoch}: loss {loss.item():.3f}")

with torch.no_grad():
    batch = data.PackedBatch.from_sequences(documents.sequences)
    together = model.logits(batch)
    alone = [model.logits(data.PackedBatch.from_sequences([sentence])) for sentence in documents.sequences]
difference = (together - torch.cat(alone)).abs().max()
print(f"{batch.n_sequences} sentences together or alone: difference up to {difference:.1e}")
