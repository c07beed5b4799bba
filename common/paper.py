"""The paper's tables as data: encoders, scores, columns, rows and the paper's own numbers.

VARIANTS and SCORERS are the commands behind a cell, COLUMNS say which number of a score a column
has. In miniature a table may differ: what then holds stands in its `miniature`. tables.py runs
and writes all of it.
"""

VARIANTS = {  # what is pretrained -> its flags of train.py
    "care": [],
    "byol": ["--method", "byol"],
    "sequential": ["--method", "sequential"],
    "lambda0": ["--lambda-att", "0"],
    "lambda1": ["--lambda-att", "1"],
    "lambda10": ["--lambda-att", "10"],
    "lambda250": ["--lambda-att", "250"],
    "n2": ["--blocks", "2"],
    "n3": ["--blocks", "3"],
    "n4": ["--blocks", "4"],
    "n6": ["--blocks", "6"],
    "none": ["--position", "none"],
    "sincos": ["--position", "sincos"],
    "absolute": ["--position", "absolute"],
    "detached": ["--detach-trunk"],
    "conv5": ["--tap", "conv5"],
}
SCORERS = {  # score -> the command that prints it, less encoder, data, seed and --out
    "linear": ["linear_eval.py"],
    "kNN": ["linear_eval.py", "--knn"],
    "1 %": ["semi_eval.py", "--percent", "1"],
    "10 %": ["semi_eval.py", "--percent", "10"],
    "100 %": ["semi_eval.py", "--percent", "100", "--epochs", "10", "--batch-size", "64"],
    "VOC C4": ["detect_eval.py", "--protocol", "voc-c4"],
    "COCO C4": ["detect_eval.py", "--protocol", "coco-c4"],
    "COCO FPN": ["detect_eval.py", "--protocol", "coco-fpn"],
    "figure": ["visualize.py", "--layer", "conv4", "--samples", "500"],
    "figure conv5": ["visualize.py", "--layer", "conv5", "--samples", "500"],
    "photos": ["visualize.py", "--layer", "conv5", "--image-size", "224"],
}
# BYOL's, for Table 3 on ImageNet
GRID = ["--lr", "0.01", "0.02", "0.05", "0.1", "0.005", "--epochs", "30", "50"]
DETECTION_RUNS = 5  # Sec. 4.2: "averaged over five independent trials"
COLUMNS = {  # column -> score, and its key in the last line of the scorer's output
    "linear": ("linear", "top1"),
    "linear, top-5": ("linear", "top5"),
    "kNN": ("kNN", "top1"),
    "1 %": ("1 %", "top1"),
    "10 %": ("10 %", "top1"),
    "1 %, top-5": ("1 %", "top5"),
    "10 %, top-5": ("10 %", "top5"),
    "COCO AP": ("COCO C4", "AP"),
    "COCO AP50": ("COCO C4", "AP50"),
    "COCO AP75": ("COCO C4", "AP75"),
    "COCO mask AP": ("COCO C4", "AP_mask"),
    "COCO mask AP50": ("COCO C4", "AP50_mask"),
    "COCO mask AP75": ("COCO C4", "AP75_mask"),
    "VOC AP": ("VOC C4", "AP"),
    "VOC AP50": ("VOC C4", "AP50"),
    "VOC AP75": ("VOC C4", "AP75"),
    "FPN AP": ("COCO FPN", "AP"),
    "FPN AP50": ("COCO FPN", "AP50"),
    "FPN AP75": ("COCO FPN", "AP75"),
    "FPN mask AP": ("COCO FPN", "AP_mask"),
    "FPN mask AP50": ("COCO FPN", "AP50_mask"),
    "FPN mask AP75": ("COCO FPN", "AP75_mask"),
    "maximum inside": ("figure", "pointing"),
    "map inside": ("figure", "energy"),
    "maximum inside, conv5": ("figure conv5", "pointing"),
    "map inside, conv5": ("figure conv5", "energy"),
    "figure": ("photos", "figure"),
}
ARCH_NAMES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnet50w2": "ResNet-50(2x)",
              "resnet101": "ResNet-101", "resnet152": "ResNet-152"}
R50, R50W2, R101, R152 = "resnet50", "resnet50w2", "resnet101", "resnet152"
SEMI = ["1 %", "10 %", "1 %, top-5", "10 %, top-5"]
PROBES = {"columns": ["linear", "kNN"]}  # what the miniature has instead
# Further rows of the miniature's comparison, which the paper has in other tables.
ABLATED = [
    ("lambda 0", "lambda0", R50, 100, ""),
    ("sequential", "sequential", R50, 100, ""),
]
TABLE3A = [
    ("random (paper: supervised)", "random", R50, None, "25.4 56.4 48.4 80.4"),
    ("BYOL", "byol", R50, 800, "53.2 68.8 78.4 89.0"),
    ("CARE", "care", R50, 400, "60.0 69.6 81.3 89.3"),
]
# A table: title, columns, rows (name, variant, arch, epochs, the paper's number for each column).
# Rows of other methods are not here: what this code does not train. `miniature`: the table has a
# form in miniature, which differs in these.
TABLES = {
    "table1a": {
        "title": "Table 1a: linear classification, ResNet-50",
        "columns": ["linear"],
        "rows": [
            ("BYOL", "byol", R50, 100, "66.5"),
            ("BYOL", "byol", R50, 200, "70.6"),
            ("BYOL", "byol", R50, 400, "73.2"),
            ("CARE", "care", R50, 100, "72.0"),
            ("CARE", "care", R50, 200, "73.8"),
            ("CARE", "care", R50, 400, "74.7"),
        ],
        "note": "The paper's row for BYOL is not of this recipe: it is SimSiam's reproduction, "
                "digit for digit, at batch 4096 with another optimiser. The nearest published "
                "number of the same recipe is the paper's own lambda 0 (Table 6), 70.52; public "
                "BYOL-like runs of ResNet-50 over 100 epochs gave 68.4 and 70.7.",
        "miniature": PROBES | {
            "title": "Table 1: linear classification and kNN",
            "rows": [
                ("random", "random", R50, None, ""),
                ("supervised: all layers, all labels", "supervised", R50, None, ""),
                ("BYOL", "byol", R50, 100, "66.5"),
                ("CARE", "care", R50, 100, "72.0"),
            ]},
    },
    "table1b": {
        "title": "Table 1b: linear classification, other encoders",
        "columns": ["linear"],
        "rows": [
            ("BYOL", "byol", R50W2, 100, "71.9"),
            ("BYOL", "byol", R101, 100, "72.3"),
            ("BYOL", "byol", R152, 100, "73.3"),
            ("CARE", "care", R50, 200, "73.8"),
            ("CARE", "care", R50W2, 100, "73.5"),
            ("CARE", "care", R50W2, 200, "75.0"),
            ("CARE", "care", R101, 100, "73.5"),
            ("CARE", "care", R152, 100, "74.9"),
        ],
        "note": "The paper's rows of vision transformers (ViT-S, ViT-B) and of CMC are not trained "
                "here.",
    },
    "table2": {
        "title": "Table 2: linear classification, more epochs",
        "columns": ["linear", "linear, top-5"],
        "rows": [
            ("BYOL", "byol", R50, 800, "74.3 91.7"),
            ("BYOL", "byol", R50W2, 800, "76.2 92.8"),
            ("BYOL", "byol", R101, 800, "76.6 93.2"),
            ("BYOL", "byol", R152, 800, "77.3 93.3"),
            ("CARE", "care", R50, 200, "73.8 91.5"),
            ("CARE", "care", R50, 400, "74.7 92.0"),
            ("CARE", "care", R50, 800, "75.6 92.3"),
            ("CARE", "care", R50W2, 200, "75.0 92.2"),
            ("CARE", "care", R50W2, 400, "76.5 93.0"),
            ("CARE", "care", R50W2, 800, "77.0 93.2"),
            ("CARE", "care", R101, 200, "75.9 92.7"),
            ("CARE", "care", R101, 400, "76.9 93.3"),
            ("CARE", "care", R101, 800, "77.2 93.5"),
            ("CARE", "care", R152, 200, "76.6 93.1"),
            ("CARE", "care", R152, 400, "77.4 93.6"),
            ("CARE", "care", R152, 800, "78.1 93.8"),
        ],
    },
    "table3a": {
        "title": "Table 3a: fine-tuning on 1 % and 10 % of the labels, ResNet-50",
        "columns": SEMI,
        "rows": TABLE3A,
        "miniature": {
            "columns": ["1 %", "10 %"],
            "rows": [*TABLE3A, *ABLATED],
            "note": "The paper's table has no lambda 0 and no sequential streams.",
        },
    },
    "table3b": {
        "title": "Table 3b: fine-tuning on 1 % and 10 % of the labels, other encoders",
        "columns": SEMI,
        "rows": [
            ("BYOL", "byol", R50W2, 100, "55.6 66.7 77.5 87.7"),
            ("BYOL", "byol", R101, 100, "55.8 65.8 79.5 87.4"),
            ("BYOL", "byol", R152, 100, "56.8 67.2 79.3 88.1"),
            ("CARE", "care", R50W2, 100, "57.4 67.5 79.8 88.3"),
            ("CARE", "care", R50W2, 200, "61.2 69.6 82.3 89.5"),
            ("CARE", "care", R101, 100, "57.1 67.1 80.8 88.2"),
            ("CARE", "care", R101, 200, "62.2 70.4 85.0 89.8"),
            ("CARE", "care", R152, 100, "59.4 69.0 82.3 89.0"),
        ],
    },
    "table4": {
        "title": "Table 4: transfer to detection and instance segmentation, C4",
        "columns": ["COCO AP", "COCO AP50", "COCO AP75", "COCO mask AP", "COCO mask AP50",
                    "COCO mask AP75", "VOC AP", "VOC AP50", "VOC AP75"],
        "rows": [
            ("random", "random", R50, None, "26.4 44.0 27.8 29.3 46.9 30.8 33.8 60.2 33.1"),
            ("supervised", "supervised", R50, 90, "38.2 58.2 41.2 33.3 54.7 35.2 53.5 81.3 58.8"),
            ("BYOL", "byol", R50, 200, "39.2 58.9 42.4 34.3 55.6 36.7 57.0 82.3 63.6"),
            ("CARE", "care", R50, 200, "39.4 59.2 42.6 34.6 56.1 36.8 57.7 83.0 64.5"),
            ("CARE", "care", R50, 400, "39.6 59.4 42.9 34.7 56.1 36.9 57.9 83.0 64.7"),
        ],
    },
    "table5": {
        "title": "Table 5: transfer to detection and instance segmentation, FPN",
        "columns": ["FPN AP", "FPN AP50", "FPN AP75", "FPN mask AP", "FPN mask AP50",
                    "FPN mask AP75"],
        "rows": [
            ("random", "random", R50, None, "31.0 49.5 33.2 28.5 46.8 30.4"),
            ("supervised", "supervised", R50, 90, "38.9 59.6 42.7 35.4 56.5 38.1"),
            ("BYOL", "byol", R50, 200, "39.1 59.5 42.7 35.6 56.5 38.2"),
            ("BYOL", "byol", R50, 400, "39.2 59.6 42.9 35.6 56.7 38.2"),
            ("BYOL", "byol", R50, 800, "39.4 59.9 43.0 35.8 56.8 38.5"),
            ("CARE", "care", R50, 200, "39.5 60.2 43.1 35.9 57.2 38.5"),
            ("CARE", "care", R50, 400, "39.8 60.5 43.5 36.2 57.4 38.8"),
        ],
    },
    "table6": {
        "title": "Table 6: weight of the attention supervision",
        "columns": ["linear"],
        "rows": [
            ("lambda 0", "lambda0", R50, 100, "70.52"),
            ("lambda 1", "lambda1", R50, 100, "70.88"),
            ("lambda 10", "lambda10", R50, 100, "70.96"),
            ("lambda 100", "care", R50, 100, "72.06"),
            ("lambda 250", "lambda250", R50, 100, "72.00"),
        ],
        "miniature": PROBES,
    },
    "table7": {
        "title": "Table 7: attention blocks",
        "columns": ["linear"],
        "rows": [
            ("2 blocks", "n2", R50, 100, "71.08"),
            ("3 blocks", "n3", R50, 100, "71.60"),
            ("4 blocks", "n4", R50, 100, "71.79"),
            ("5 blocks", "care", R50, 100, "72.06"),
            ("6 blocks", "n6", R50, 100, "69.37"),
        ],
        "miniature": PROBES,
    },
    "table8": {
        "title": "Table 8: position encoding",
        "columns": ["linear"],
        "rows": [
            ("none", "none", R50, 100, "69.49"),
            ("sincos", "sincos", R50, 100, "66.68"),
            ("learnable absolute", "absolute", R50, 100, "72.01"),
            ("learnable relative", "care", R50, 100, "72.06"),
        ],
        "miniature": PROBES,
    },
    "sequential": {
        "title": "Sec. 4.3: parallel and sequential streams",
        "columns": ["linear"],
        "rows": [
            ("sequential", "sequential", R50, 100, "69.32"),
            ("parallel", "care", R50, 100, "72.02"),
        ],
        "miniature": PROBES,
    },
    "readings": {
        "title": "Sec. 3.3 and Fig. 2, read literally, against the release",
        "columns": ["linear"],
        "rows": [
            ("as the release", "care", R50, 100, ""),
            ("T-stream gradients stay out of the encoder (Sec. 3.3)", "detached", R50, 100, ""),
            ("T-stream reads conv5 (Fig. 2)", "conv5", R50, 100, ""),
        ],
        "miniature": PROBES,
    },
    "figure4": {
        "title": "Figure 4: Grad-CAM of C-stream alone (BYOL) and CARE",
        "columns": ["figure"],
        "rows": [("BYOL and CARE", "care", R50, 200, "")],
        "miniature": {
            "title": "Figure 4: does Grad-CAM point at the object?",
            "columns": ["maximum inside", "map inside", "maximum inside, conv5",
                        "map inside, conv5"],
            "rows": [
                ("random", "random", R50, None, ""),
                ("BYOL", "byol", R50, 200, ""),
                ("CARE", "care", R50, 200, ""),
                *ABLATED,
            ],
            "note": "Maps are of conv4 unless it says conv5. CARE's T-stream reads conv4 in "
                    "training, and nothing in BYOL does. Chance is the objects' share of the "
                    "image; for the maximum it is any position of the map, each as often. *same "
                    "position* is a maximum at one position in all images, the best for them. The "
                    "paper shows a figure and no numbers.",
        },
    },
}
