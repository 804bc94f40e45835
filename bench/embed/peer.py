"""The peer of the embedding benchmark: sentence-transformers in process.

Reads one JSON object a line, {"texts": [...], "batch": 32}, embeds the texts and answers
{"seconds": s, "cpu": s, "first": [vector of the first text]}. Needs: pip install sentence-transformers.

usage: peer.py CHECKPOINT_DIR THREADS
"""
import json
import sys
import time

import torch
from sentence_transformers import SentenceTransformer

torch.set_num_threads(int(sys.argv[2]))
model = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    start, cpu = time.perf_counter(), time.process_time()
    out = model.encode(job["texts"], batch_size=job["batch"], normalize_embeddings=True, show_progress_bar=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "first": [float(x) for x in out[0]]}), flush=True)
