import torch


def grouped_linear(x, weight, ends):
    e = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ weight[g].to(x.dtype).T for g, (a, b) in enumerate(zip(e, e[1:]))])
