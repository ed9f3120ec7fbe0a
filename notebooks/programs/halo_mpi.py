"""An MPI program: start it with `mpiexec -n 2 python halo_mpi.py`. All ranks run it from the top.

With capital letters (Send, Sendrecv, Bcast, Allreduce), mpi4py sends the memory of an array as it
is. With small letters (send, bcast, gather), it sends any Python object, as a pickle.
"""

import numpy as np
import torch
from mpi4py import MPI
from smoothing import smooth_array

STEPS = 20
ROWS, COLUMNS = 427, 640

world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
above = rank - 1 if rank > 0 else MPI.PROC_NULL  # A message to or from nobody: it does nothing.
below = rank + 1 if rank < size - 1 else MPI.PROC_NULL
torch.set_num_threads(1)


def exchange_halos(part):
    """Sendrecv sends one row and receives another one at the same time: no deadlock."""
    world.Sendrecv(part[1], dest=above, recvbuf=part[-1], source=below)
    world.Sendrecv(part[-2], dest=below, recvbuf=part[0], source=above)


def smooth_in_ranks(image):
    """Smooth this rank's rows STEPS times. Returns them, without the halo."""
    first = rank * (ROWS - 2) // size
    last = (rank + 1) * (ROWS - 2) // size + 2
    part = image[first:last].copy()
    for _ in range(STEPS):
        part[1:-1] = smooth_array(part)
        exchange_halos(part)
    return part[1:-1]


def time_messages(send, receive, repeats=15):
    """Median seconds of a message from rank 0 to rank 1 and back."""
    seconds = []
    for _ in range(repeats):
        world.Barrier()
        start = MPI.Wtime()
        if rank == 0:
            send(1)
            receive(1)
        elif rank == 1:
            receive(0)
            send(0)
        seconds.append(MPI.Wtime() - start)
    return float(np.median(seconds[1:]))  # The first message also opens the connection.


def main():
    image = np.empty((ROWS, COLUMNS), np.float32)
    if rank == 0:
        image[:] = np.random.default_rng(0).random(image.shape)
    world.Bcast(image, root=0)
    start = MPI.Wtime()
    own = smooth_in_ranks(image)
    seconds = np.array(MPI.Wtime() - start)
    world.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)  # The slowest rank counts.
    parts = world.gather(own)  # Once, at the end: a pickle does no harm here.
    if rank == 0:
        whole = image.copy()
        for _ in range(STEPS):
            whole[1:-1] = smooth_array(whole)
        difference = np.abs(np.concatenate(parts) - whole[1:-1]).max()
        print(f"MPI, {size} ranks: {STEPS} steps in {1000 * seconds:.0f} ms;", end=" ")
        print(f"largest difference from one process {difference:.0e}")
    if size < 2:
        return
    buffer = np.zeros((2, 2**20), np.float32)
    as_buffer = time_messages(lambda to: world.Send(buffer, to), lambda to: world.Recv(buffer, to))
    as_pickle = time_messages(lambda to: world.send(buffer, to), lambda to: world.recv(source=to))
    if rank == 0:
        print(f"A message of {buffer.nbytes / 2**20:.0f} MiB, there and back:")
        print(f"  as a buffer (Send, Recv): {1000 * as_buffer:.1f} ms")
        print(f"  as a pickle (send, recv): {1000 * as_pickle:.1f} ms")


main()
