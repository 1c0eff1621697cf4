"""Compile the language model in this folder and let it write.

python examples/quickstart.py
"""

from pathlib import Path

import sylvester as sv

MODEL = Path(__file__).parent / "models" / "novels-7m"

PROMPT = "Once upon a time"

compiled = sv.compile(MODEL, target="cpu")
print(PROMPT, end="")
for piece in compiled.generate(PROMPT, max_new_tokens=100, stream=True):
    print(piece, end="", flush=True)
print()
