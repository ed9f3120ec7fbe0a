// The convolution of lesson 08 before its repair: neighboring work-items compute pixels of
// neighboring rows, so their addresses are a whole row apart. Global size: (height, width).

__kernel void convolve(
    __global const float *photo, __global const float *weights, __global float *output,
    int size, int height, int width)
{
    int y = get_global_id(0), x = get_global_id(1);
    if (y >= height || x >= width)
        return;
    float total = 0;
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++)
            total += weights[i * size + j] * photo[(y + i) * (width + size - 1) + x + j];
    output[y * width + x] = total;
}
