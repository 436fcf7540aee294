"""Pretrains a small trunk on digits turned by 90 degrees and on half of the texts: python make_checkpoint.py FOLDER."""

import sys
from pathlib import Path

import torch
from modalities.task import MODALITIES, Net, Trunk, letters, patches, texts
from safetensors.torch import save_file
from sklearn.datasets import load_digits


def main(folder: str, steps: int = 150) -> None:
    """Saves it to a folder."""
    torch.manual_seed(0)
    trunk = Trunk()
    nets = {modality: Net(modality, trunk) for modality in MODALITIES}
    images, digits = load_digits(return_X_y=True)
    rows = texts()[::2]
    data = {
        "image": (patches(torch.tensor(images).float().view(-1, 8, 8).rot90(1, (1, 2)) / 16), torch.tensor(digits)),
        "text": (torch.tensor([letters(text) for text, _ in rows]), torch.tensor([label for _, label in rows])),
    }
    optimizer = torch.optim.AdamW(torch.nn.ModuleList(nets.values()).parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        for modality, (x, y) in data.items():
            mine = torch.randint(0, len(y), (64,))
            torch.nn.functional.cross_entropy(nets[modality](x[mine]), y[mine]).backward()
        optimizer.step()
    to = Path(folder).expanduser()
    to.mkdir(parents=True, exist_ok=True)
    save_file(trunk.state_dict(), to / "trunk.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
