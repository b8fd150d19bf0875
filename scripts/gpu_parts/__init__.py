"""The parts of ``scripts/gpu_check.py``, one module each; ``part.py`` is what they have in common.

A part has a ``TITLE``, its ``SECONDS`` out of twelve minutes, ``rows(tiny)``, the names of what it measures in the
order of their worth, ``run(part)``, and ``table(entries, tiny)``. Only ``run`` may import what is slow to import.
"""

from types import ModuleType

from gpu_parts import correctness, language_model, memory, pictures, update_cost

PARTS: dict[str, ModuleType] = {
    "correctness": correctness,
    "update_cost": update_cost,
    "language_model": language_model,
    "pictures": pictures,
    "memory": memory,
}
"""All parts, in the order of their worth."""
