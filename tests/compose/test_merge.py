"""mergekit's merges in memory against the formulae."""

import torch

from moiety.compose.merge import everything, soup, task_arithmetic


def models() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    base = {"w": torch.randn(5, 3), "norm": torch.randn(3)}
    finetunes = {
        name: {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in base.items()}
        for name in ("base", "law", "code")
    }
    return base, finetunes


def test_soup_is_the_mean() -> None:
    _, finetunes = models()
    merged = soup(finetunes, everything)
    for key, tensor in merged.items():
        mean = torch.stack([finetune[key] for finetune in finetunes.values()]).mean(0)
        torch.testing.assert_close(tensor, mean)


def test_task_arithmetic_adds_task_vectors() -> None:
    base, finetunes = models()
    merged = task_arithmetic(base, finetunes, 0.3, lambda name: name == "w")
    assert list(merged) == ["w"]
    vectors = sum(finetune["w"] - base["w"] for finetune in finetunes.values())
    torch.testing.assert_close(merged["w"], base["w"] + 0.3 * vectors)
