"""ATST-Clip as its authors structured it, in plain PyTorch; see benchmarks/official.py for the parts."""

import torch
from torch import nn

from benchmarks import official


class Encoder(official.Encoder):
    def __init__(self, dim, depth, num_heads, **kwargs):
        super().__init__(dim, depth, num_heads, **kwargs)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = self.norm_frame
        del self.norm_frame

    def tokens(self, mel, length):
        """All rows after the last norm, the class token first."""
        x = self.patch_embed(mel)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos_embed[:, : x.shape[1]].expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, length // self.patch_embed.patch[1] + 1)
        return self.norm(x)

    def forward(self, mel, length):
        return self.tokens(mel, length)[:, 0]


class Network(official.Network):
    def forward(self, views, lengths):
        return self.predictor(self.projector(self.encoder(torch.cat(views), torch.cat(lengths))))


class System(official.System):
    encoder = Encoder
    network = Network

    def forward(self, view1, view2, lengths1, lengths2):
        batch = [view1, view2], [lengths1, lengths2]
        teacher, student = self.teacher(*batch), self.student(*batch)
        spreads = [official.spread(nn.functional.normalize(y, dim=-1)) for y in (student, teacher)]
        (s1, s2), (t1, t2) = student.chunk(2), teacher.chunk(2)
        return (official.distance(t1, s2) + official.distance(t2, s1)) / 2, *spreads
