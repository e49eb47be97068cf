"""readability.py < rows > rows: adds to each row as `reward` how easy its `response` is to read: Flesch's reading ease
(100 easy, 0 hard), by textstat (pip install textstat==0.7.4 'setuptools<80', whose syllables
need no download). A preference that is known exactly, for `just marks="python3 experiments/readability.py" … experiment`."""

import json
import sys

import textstat

for line in sys.stdin:
    row = json.loads(line)
    row["reward"] = textstat.flesch_reading_ease(row["response"])
    print(json.dumps(row, ensure_ascii=False))
