"""Measures the requests and images a second that ``posttrain serve-reward`` answers, with up to 16 clients.

python benchmarks/serve_reward.py [REWARD] [SIDE] [IMAGES A REQUEST]
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from posttrain.rewards.remote import Remote
from posttrain.scoring.probes import probe

SECONDS = 5.0


def main(name: str = "jpeg_compressibility", side: int = 512, images: int = 4) -> None:
    pixels, row = torch.rand(images, 3, side, side), probe(0)[1]
    prompts, rows = [row["prompt"]] * images, [row] * images
    command = [sys.executable, "-m", "posttrain", "serve-reward", name, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        try:
            score = Remote(url=url, name=name, batch_size=images).load(torch.device("cpu"))
            score(pixels, prompts, rows)
            megabytes = pixels.nbytes / 1e6
            print(f"{name}: {images} images of {side} x {side} a request ({megabytes:.1f} MB)")
            for clients in (1, 4, 16):
                ends = time.monotonic() + SECONDS

                def client(_: int, ends: float = ends) -> int:
                    done = 0
                    while time.monotonic() < ends:
                        score(pixels, prompts, rows)
                        done += 1
                    return done

                began = time.monotonic()
                with ThreadPoolExecutor(clients) as pool:
                    requests = sum(pool.map(client, range(clients)))
                rate = requests / (time.monotonic() - began)
                print(f"{clients:3} clients: {rate:7.1f} requests/s {rate * images:8.1f} images/s")
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:4]))
