"""Learning rates at widths 32 to 256, by the standard parametrisation and by muP: does one rate fit all?"""

from scaling.study.sweep import Study, product, zip_

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]

STUDY = Study(
    name="mup",
    config="configs/digits_dit.py:F/2",
    sweep=product(
        zip_({"model.width": [32, 64, 128, 256], "model.heads": [4, 8, 16, 32]}),
        {"optimizer.mup_base": ["", "width=32,heads=4"], "optimizer.learning_rate": RATES},
    ),
    metric="fixed_loss",
    title="One learning rate for all widths",
    question="Is the best learning rate the same at each width, by the standard parametrisation and by muP?",
)
