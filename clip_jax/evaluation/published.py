"""What others measured with the same weights, to be put beside ours: percent, zero-shot.

Source: open_clip's docs/openclip_results.csv and docs/openclip_retrieval_results.csv (OpenAI's weights, measured anew).
"""

from typing import Any

SETS = ("imagenet2012", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r", "cifar10", "cifar100", "food101", "cars196")
TOP_1 = {
    "RN50": (59.82, 52.84, 35.44, 23.27, 60.73, 71.57, 40.30, 80.80, 54.53),
    "RN101": (62.28, 56.12, 41.06, 29.44, 68.17, 80.78, 47.64, 83.67, 61.00),
    "RN50x4": (66.27, 59.44, 44.68, 41.45, 72.74, 79.43, 45.14, 86.40, 66.73),
    "RN50x16": (70.72, 64.20, 50.63, 57.24, 79.33, 81.34, 52.09, 90.51, 72.86),
    "RN50x64": (73.91, 67.06, 55.93, 70.77, 84.41, 85.10, 59.85, 92.05, 75.81),
    "ViT-B/32": (63.32, 55.92, 42.29, 31.55, 69.33, 89.83, 64.23, 84.00, 59.63),
    "ViT-B/16": (68.34, 61.88, 48.24, 49.95, 77.70, 90.77, 66.95, 88.72, 64.77),
    "ViT-L/14": (75.54, 69.83, 59.59, 70.75, 87.84, 95.59, 75.82, 93.05, 77.88),
    "ViT-L/14@336px": (76.56, 70.89, 61.00, 77.48, 89.05, 94.93, 74.36, 93.86, 79.32),
}
# Recall at 1, of the picture and of the text.
RECALL = {
    "RN50": {"flickr30k": (57.36, 80.00), "coco_captions": (28.54, 48.84)},
    "RN101": {"flickr30k": (58.04, 79.00), "coco_captions": (30.69, 49.82)},
    "RN50x4": {"flickr30k": (62.58, 82.10), "coco_captions": (33.39, 52.96)},
    "RN50x16": {"flickr30k": (65.34, 85.70), "coco_captions": (35.41, 55.36)},
    "RN50x64": {"flickr30k": (68.98, 86.90), "coco_captions": (35.24, 58.42)},
    "ViT-B/32": {"flickr30k": (58.78, 78.90), "coco_captions": (30.44, 50.12)},
    "ViT-B/16": {"flickr30k": (62.16, 82.20), "coco_captions": (33.09, 52.42)},
    "ViT-L/14": {"flickr30k": (64.96, 85.20), "coco_captions": (36.51, 56.34)},
    "ViT-L/14@336px": {"flickr30k": (66.90, 87.70), "coco_captions": (37.09, 57.94)},
}
IMAGENET = {
    "ViT-B-32:laion2b_s34b_b79k": 66.56,
    "ViT-B-32:datacomp_xl_s13b_b90k": 69.17,
    "ViT-B-16:laion2b_s34b_b88k": 70.23,
    "ViT-B-16:datacomp_xl_s13b_b90k": 73.49,
    "ViT-L-14:laion2b_s32b_b82k": 75.25,
    "ViT-L-14:datacomp_xl_s13b_b90k": 79.21,
    "ViT-H-14:laion2b_s32b_b79k": 77.96,
    "ViT-bigG-14:laion2b_s39b_b160k": 80.09,
    "ViT-B-16-SigLIP:webli": 76.04,
    "ViT-SO400M-14-SigLIP-384:webli": 83.08,
}


def published(record: dict[str, Any]) -> dict[str, float]:
    """The published value of each metric of a record for which there is one, as a share.

    Model and set are known by the names by which they were asked for: a file or a folder may hold anything.
    """
    name, dataset, found = record["pretrained"], record.get("asked"), {}
    if record["task"] == "zeroshot_classification":
        found = {"acc1": dict(zip(SETS, TOP_1.get(name, ()))).get(dataset)}
        if dataset == "imagenet2012" and name in IMAGENET:
            found = {"acc1": IMAGENET[name]}
    elif record["task"] == "zeroshot_retrieval" and dataset in RECALL.get(name, {}):
        found = dict(zip(("image_retrieval_recall@1", "text_retrieval_recall@1"), RECALL[name][dataset]))
    return {metric: value / 100 for metric, value in found.items() if value is not None}
