"""Laws of tables of values: forms as data, one posterior, rival forms, predictions. NumPy and SciPy only."""

from scaling.laws.belief import Belief, believe
from scaling.laws.forms import FORMS, Form
from scaling.laws.values import Values

__all__ = ["FORMS", "Belief", "Form", "Values", "believe"]
