"""What PyTorch's libraries want on a machine without a GPU."""


def torchvision_without_gpu() -> object:
    """torchvision's wheel for GPUs imports on a machine without one if these operators are declared."""
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    try:
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # a build for the CPU has them
    return operators
