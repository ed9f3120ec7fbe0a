/* One convolution of a photo, in C with OpenMP.

   convolve FOLDER HEIGHT WIDTH SIZE REPEATS THREADS...

   Reads photo.bin and kernel.bin (32-bit floats) and widths.bin (32-bit integers: how many pixels
   of each row to compute) from FOLDER. Computes REPEATS times with each number of threads, each
   time after an untimed call. Prints "threads seconds" for each timed call, and writes output.bin.
   The environment variable OMP_SCHEDULE chooses the schedule: "static" or "dynamic,1", say. */

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

static void convolve(const float *photo, const float *kernel, const int *widths, float *output,
                     int rows, int columns, int size)
{
    int width = columns + size - 1; /* of the photo */
    #pragma omp parallel for schedule(runtime)
    for (int y = 0; y < rows; y++) {
        float *row = output + (size_t)y * columns;
        for (int x = 0; x < widths[y]; x++)
            row[x] = 0;
        for (int i = 0; i < size; i++)
            for (int j = 0; j < size; j++) {
                float weight = kernel[i * size + j];
                const float *pixels = photo + (size_t)(y + i) * width + j;
                for (int x = 0; x < widths[y]; x++) /* SIMD: several pixels per instruction */
                    row[x] += weight * pixels[x];
            }
    }
}

static void *load(const char *folder, const char *name, size_t count)
{
    char path[4096];
    void *data = malloc(4 * count);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file || !data || fread(data, 4, count, file) != count) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(1);
    }
    fclose(file);
    return data;
}

int main(int argc, char **argv)
{
    if (argc < 7) {
        fprintf(stderr, "usage: convolve FOLDER HEIGHT WIDTH SIZE REPEATS THREADS...\n");
        return 2;
    }
    const char *folder = argv[1];
    int height = atoi(argv[2]), width = atoi(argv[3]), size = atoi(argv[4]);
    int repeats = atoi(argv[5]), rows = height - size + 1, columns = width - size + 1;
    float *photo = load(folder, "photo.bin", (size_t)height * width);
    float *kernel = load(folder, "kernel.bin", (size_t)size * size);
    int *widths = load(folder, "widths.bin", (size_t)rows);
    float *output = calloc((size_t)rows * columns, sizeof *output);

    for (int repeat = 0; repeat < repeats; repeat++)
        for (int k = 6; k < argc; k++) {
            /* Every second time in the opposite order, so that no count always comes first. */
            int threads = atoi(argv[repeat % 2 ? k : argc + 5 - k]);
            omp_set_num_threads(threads);
            convolve(photo, kernel, widths, output, rows, columns, size); /* starts threads */
            double start = omp_get_wtime();
            convolve(photo, kernel, widths, output, rows, columns, size);
            printf("%d %.9f\n", threads, omp_get_wtime() - start);
        }

    char path[4096];
    snprintf(path, sizeof path, "%s/output.bin", folder);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(output, sizeof *output, (size_t)rows * columns, file) == 0)
        return 1;
    return fclose(file);
}
