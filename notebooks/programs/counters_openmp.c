/* Each thread adds to a counter of its own: false sharing, if the counters share a cache line.

   counters STRIDE STEPS REPEATS THREADS

   STRIDE is the distance between two counters in bytes. Prints the seconds of each repeat. */

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: counters STRIDE STEPS REPEATS THREADS\n");
        return 2;
    }
    int stride = atoi(argv[1]), repeats = atoi(argv[3]), threads = atoi(argv[4]);
    long steps = atol(argv[2]);
    char *memory = aligned_alloc(4096, ((size_t)stride * threads / 4096 + 1) * 4096);
    omp_set_num_threads(threads);
    for (int repeat = 0; repeat <= repeats; repeat++) {
        double start = omp_get_wtime();
        #pragma omp parallel
        {
            /* volatile: without it, the compiler would keep the counter in a register. */
            volatile long *counter = (volatile long *)(memory + stride * omp_get_thread_num());
            *counter = 0;
            for (long step = 0; step < steps; step++)
                *counter += 1;
        }
        if (repeat > 0)
            printf("%.9f\n", omp_get_wtime() - start);
    }
    free(memory);
    return 0;
}
