// A convolution with the tile of a work-group in local memory (lesson 08).

#define ACROSS 32 // work-items of a work-group
#define DOWN 4
#define SIZE 7 // weights in a row
#define TILE_WIDTH (ACROSS + SIZE - 1)
#define TILE_HEIGHT (DOWN + SIZE - 1)

__kernel void convolve(
    __global const float *photo, __global const float *weights, __global float *output,
    int size, int height, int width)
{
    __local float tile[TILE_HEIGHT][TILE_WIDTH];
    int x = get_global_id(0), y = get_global_id(1);
    int column = get_local_id(0), row = get_local_id(1);
    int left = x - column, top = y - row;
    int last_column = width + size - 2, last_row = height + size - 2;

    for (int i = row; i < TILE_HEIGHT; i += DOWN)
        for (int j = column; j < TILE_WIDTH; j += ACROSS)
            tile[i][j] = photo[min(top + i, last_row) * (last_column + 1) + min(left + j, last_column)];
    barrier(CLK_LOCAL_MEM_FENCE);

    if (y < height && x < width) {
        float total = 0;
        for (int i = 0; i < SIZE; i++)
            for (int j = 0; j < SIZE; j++)
                total += weights[i * SIZE + j] * tile[row + i][column + j];
        output[y * width + x] = total;
    }
}
