"""Threads that take turns in no order: prints who had them, and a hash over all of it.

Each thread notes its turns in one list and makes a system call now and then, by which an interrupt
gets in; a short switch interval lets the clock decide who goes on.
"""

import hashlib
import os
import sys
import threading
import time

THREADS = 4
TURNS = 400

sys.setswitchinterval(50e-6)
turns = bytearray()
gate = threading.Barrier(THREADS)


def take_turns(number: int) -> None:
    gate.wait()
    for turn in range(TURNS):
        turns.append(ord("0") + number)
        for _ in range(30):
            os.getppid()
        if turn % 50 == number:
            time.sleep(0.0005)


threads = [threading.Thread(target=take_turns, args=(number,)) for number in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
order = turns.decode()
switches = sum(a != b for a, b in zip(order, order[1:]))
print(f"{switches} switches in {len(order)} turns: {order[:64]}…")
print(hashlib.sha256(turns).hexdigest())
