"""Lesson 01, a CNN from scratch: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cnnlab.check import Task

TASKS = {}


# 01.1: convolution with loops


def conv2d_loops(image, kernel):
    """Slide the kernel over the image: an output value is the sum of 3 x 3 (or K x K) products.

    image (H, W), kernel (K, K). Returns (H - K + 1, W - K + 1).
    """
    size = len(kernel)
    output = torch.zeros(image.shape[0] - size + 1, image.shape[1] - size + 1)
    for y in range(output.shape[0]):
        for x in range(output.shape[1]):
            for i in range(size):
                for j in range(size):
                    output[y, x] += image[y + i, x + j] * kernel[i, j]
    return output


def image_and_kernel():
    yield torch.randn(5, 6), torch.randn(3, 3)
    yield torch.randn(7, 5), torch.randn(2, 2)


def flipped_kernel(image, kernel):
    return conv2d_loops(image, kernel.flip(0, 1))


def transposed_kernel(image, kernel):
    return conv2d_loops(image, kernel.T)


def only_the_last_product(image, kernel):
    size = len(kernel)
    return kernel[-1, -1] * image[size - 1 :, size - 1 :]


def one_row_and_column_too_few(image, kernel):
    return conv2d_loops(image, kernel)[:-1, :-1]


def as_large_as_the_image(image, kernel):
    output = torch.zeros(image.shape)
    small = conv2d_loops(image, kernel)
    output[: small.shape[0], : small.shape[1]] = small
    return output


TASKS["01.1"] = Task(
    reference=conv2d_loops,
    inputs=image_and_kernel,
    hints=[
        "Start with a tensor of zeros of the right shape: `torch.zeros(rows, columns)`. Two loops "
        "choose the output value (y, x). Two more loops choose the weight (i, j).",
        "When the kernel lies at (y, x), its weight (0, 0) is on pixel (y, x), and its weight "
        "(1, 2) is on pixel (y + 1, x + 2). Multiply the two numbers.",
        "The number of rows of the output is H - K + 1, where H is `image.shape[0]` and K is "
        "`len(kernel)`. In the innermost loop, add one product to `output[y, x]` with `+=`.",
    ],
    mistakes={
        flipped_kernel: "The kernel is flipped. Weight (0, 0) belongs to the top left pixel of the "
        "patch.",
        transposed_kernel: "Rows and columns of the kernel are exchanged: i counts rows, j counts "
        "columns.",
        only_the_last_product: "Each output value is only the last of its products. Add them up.",
        one_row_and_column_too_few: "The last row and the last column are missing. In how many "
        "places does a kernel of 3 pixels fit into 5 pixels?",
        as_large_as_the_image: "The output has the size of the image, but the kernel does not fit "
        "at the right and at the bottom edge.",
    },
)


# 01.2: im2col


def im2col(image, size):
    """Copy each patch of an image to a column of a matrix.

    image (C, H, W). Returns (C * size * size, positions). A position is a place of the kernel,
    from left to right, then from top to bottom.
    """
    columns = []
    for y in range(image.shape[1] - size + 1):
        for x in range(image.shape[2] - size + 1):
            patch = image[:, y : y + size, x : x + size]
            columns.append(patch.flatten())
    return torch.stack(columns, dim=1)


def images_and_sizes():
    yield torch.arange(24.0).reshape(1, 4, 6), 3
    yield torch.randn(2, 5, 4), 2


def patches_in_rows(image, size):
    return im2col(image, size).T


def top_to_bottom_first(image, size):
    return im2col(image.mT, size).unflatten(0, (-1, size, size)).mT.flatten(0, 2)


def first_channel_only(image, size):
    return im2col(image[:1], size)


def separate_patches(image, size):
    columns = []
    for y in range(0, image.shape[1] - size + 1, size):
        for x in range(0, image.shape[2] - size + 1, size):
            columns.append(image[:, y : y + size, x : x + size].flatten())
    return torch.stack(columns, dim=1)


TASKS["01.2"] = Task(
    reference=im2col,
    inputs=images_and_sizes,
    hints=[
        "Two loops choose the position (y, x), as in task 01.1. Collect the flattened patches in a "
        "list, and make a matrix of the list at the end.",
        "A slice takes the whole patch: rows y to y + size, columns x to x + size, and all "
        "channels. `image[:, 2:5, 0:3]` is a patch of 3 x 3 pixels in all channels.",
        "`torch.stack(vectors, dim=1)` makes a matrix in which the first vector is the first "
        "column.",
    ],
    mistakes={
        patches_in_rows: "Each patch is a row. It must be a column: see `dim` of `torch.stack`.",
        top_to_bottom_first: "The positions go from top to bottom first. The outer loop must be "
        "over y.",
        first_channel_only: "A patch has the pixels of all channels.",
        separate_patches: "The patches do not overlap. The kernel moves by one pixel, not by "
        "`size` pixels.",
    },
)


# 01.3: max pooling


def max_pool2d(maps):
    """Keep the largest value of each block of 2 x 2. (N, C, H, W) -> (N, C, H / 2, W / 2)."""
    top = torch.maximum(maps[..., 0::2, 0::2], maps[..., 0::2, 1::2])
    bottom = torch.maximum(maps[..., 1::2, 0::2], maps[..., 1::2, 1::2])
    return torch.maximum(top, bottom)


def random_maps():
    yield (torch.randn(1, 1, 4, 6),)
    yield (torch.randn(2, 3, 6, 4),)


def mean_of_each_block(maps):
    return F.avg_pool2d(maps, 2)


def overlapping_blocks(maps):
    return F.max_pool2d(maps, 2, stride=1)


def first_of_each_block(maps):
    return maps[..., 0::2, 0::2]


def largest_in_each_row(maps):
    return torch.maximum(maps[..., 0::2, 0::2], maps[..., 0::2, 1::2])


def one_axis_only(maps):
    return torch.maximum(maps[..., 0::2], maps[..., 1::2])


TASKS["01.3"] = Task(
    reference=max_pool2d,
    inputs=random_maps,
    hints=[
        "Each block has four values. Make four smaller tensors: one has the top left value of each "
        "block, the others have the top right, the bottom left and the bottom right values.",
        "`0::2` in a slice means 0, 2, 4, ... and `1::2` means 1, 3, 5, ... The last two axes are "
        "rows and columns: `maps[..., 1::2, 0::2]` has the bottom left value of each block.",
        "`torch.maximum(a, b)` takes the larger value at each place. You need it three times for "
        "four tensors.",
    ],
    mistakes={
        mean_of_each_block: "This is the mean of each block. Max pooling keeps the largest value.",
        overlapping_blocks: "The blocks overlap. They must be next to each other.",
        first_of_each_block: "This is the top left value of each block, not the largest one.",
        largest_in_each_row: "Only the upper row of each block is used.",
        one_axis_only: "Only the width is halved. Height and width must both be halved.",
    },
)


# 01.4: the gradient with respect to the weight


def weight_gradient(image, gradient, size):
    """The gradient of the loss with respect to the weight of a convolution.

    image (C, H, W), gradient (O, H - size + 1, W - size + 1): the gradient with respect to the
    output. Returns (O, C, size, size).
    """
    flat = gradient.flatten(1)  # (O, positions)
    product = flat @ im2col(image, size).T
    return product.reshape(len(gradient), len(image), size, size)


def image_and_gradient():
    yield torch.randn(2, 5, 6), torch.randn(3, 3, 4), 3
    yield torch.randn(1, 4, 4), torch.randn(2, 3, 3), 2


def gradient_of_a_sum(image, gradient, size):
    return weight_gradient(image, torch.ones_like(gradient), size)


def mean_over_the_positions(image, gradient, size):
    return weight_gradient(image, gradient, size) / gradient[0].numel()


def reshaped_instead_of_transposed(image, gradient, size):
    return weight_gradient(image, gradient, size).flatten(1).T.reshape(-1, len(image), size, size)


def still_a_matrix(image, gradient, size):
    return weight_gradient(image, gradient, size).flatten(1)


TASKS["01.4"] = Task(
    reference=weight_gradient,
    inputs=image_and_gradient,
    hints=[
        "Turn all three into matrices, as in `conv2d_matmul`. There, (O, positions) = (O, C * size "
        "* size) @ (C * size * size, positions).",
        "You have a matrix (O, positions) and a matrix (C * size * size, positions), and you want "
        "(O, C * size * size). Which of the two must be transposed? `matrix.T` is the transpose.",
        "`gradient.flatten(1)` has the shape (O, positions). At the end, `reshape` the product to "
        "four axes: O is `len(gradient)` and C is `len(image)`.",
    ],
    mistakes={
        gradient_of_a_sum: "The argument `gradient` is not used. Each pixel must be multiplied by "
        "the gradient at the position that used it.",
        mean_over_the_positions: "This is the mean over all positions. Gradients add up: use the "
        "sum.",
        reshaped_instead_of_transposed: "The numbers are right, but in the wrong places: `reshape` "
        "does not exchange axes. Transpose the product first, or exchange its factors.",
        still_a_matrix: "The numbers are right. Give the result the shape of the weight.",
    },
)


# 01.5: the gradient with respect to the input


def input_gradient(gradient, weight):
    """The gradient of the loss with respect to the input of a convolution.

    gradient (O, rows, columns): the gradient with respect to the output. weight (O, C, K, K).
    Returns (C, rows + K - 1, columns + K - 1).
    """
    outputs, channels, size, _ = weight.shape
    _, rows, columns = gradient.shape
    result = torch.zeros(channels, rows + size - 1, columns + size - 1)
    for o in range(outputs):
        for y in range(rows):
            for x in range(columns):
                result[:, y : y + size, x : x + size] += gradient[o, y, x] * weight[o]
    return result


def gradient_and_weight():
    yield torch.randn(1, 2, 3), torch.randn(1, 1, 3, 3)
    yield torch.randn(3, 4, 3), torch.randn(3, 2, 2, 2)


def overwritten_patches(gradient, weight):
    outputs, channels, size, _ = weight.shape
    _, rows, columns = gradient.shape
    result = torch.zeros(channels, rows + size - 1, columns + size - 1)
    for o in range(outputs):
        for y in range(rows):
            for x in range(columns):
                result[:, y : y + size, x : x + size] = gradient[o, y, x] * weight[o]
    return result


def gradient_ignored(gradient, weight):
    return input_gradient(torch.ones_like(gradient), weight)


def flipped_weight(gradient, weight):
    return input_gradient(gradient, weight.flip(2, 3))


def size_of_the_output(gradient, weight):
    _, rows, columns = gradient.shape
    return input_gradient(gradient, weight)[:, :rows, :columns]


TASKS["01.5"] = Task(
    reference=input_gradient,
    inputs=gradient_and_weight,
    hints=[
        "Start with zeros in the shape of the input. Then visit each output value (o, y, x). It "
        "was computed from one patch, so it changes the gradient of this patch only.",
        "Output value (o, y, x) is the sum of patch * weight[o]. So the gradient of a pixel of the "
        "patch is the weight on this pixel, multiplied by the gradient of the output value.",
        "`weight[o]` has the shape (C, K, K), like the patch `result[:, y:y+K, x:x+K]`. No loop "
        "over them is needed. Patches overlap: use `+=`.",
    ],
    mistakes={
        overwritten_patches: "A later patch overwrites an earlier one. Patches overlap, and their "
        "gradients add up.",
        gradient_ignored: "The argument `gradient` is not used. Multiply the weights by the "
        "gradient of the output value.",
        flipped_weight: "The weights are flipped. Weight (0, 0) was on the top left pixel of the "
        "patch, so this pixel gets its gradient.",
        size_of_the_output: "The result has the size of the output. It must have the size of the "
        "input, which is larger.",
    },
)


# 01.6: the receptive field


def receptive_field(layers):
    """How many pixels on a side one value after the last layer depends on.

    layers: (size, stride) of each layer, from the first to the last.
    """
    field = 1
    for size, stride in reversed(layers):
        field = (field - 1) * stride + size
    return field


def stacks_of_layers():
    yield ([(3, 1)],)
    yield ([(3, 1), (3, 1)],)
    yield ([(5, 2), (2, 2), (3, 1)],)
    yield ([(7, 2), (3, 2), (3, 1), (3, 2)],)


def from_the_first_layer(layers):
    return receptive_field(layers[::-1])


def strides_ignored(layers):
    return receptive_field([(size, 1) for size, _ in layers])


def one_step_too_many(layers):
    field = 1
    for size, stride in reversed(layers):
        field = field * stride + size
    return field


def product_of_the_sizes(layers):
    field = 1
    for size, _ in layers:
        field *= size
    return field


TASKS["01.6"] = Task(
    reference=receptive_field,
    inputs=stacks_of_layers,
    hints=[
        "Go backward, from the last layer to the first: `reversed(layers)`. Start with one value.",
        "How many values of its input does a layer need for n neighboring outputs? The first one "
        "needs `size` values. Each of the others needs `stride` more.",
    ],
    mistakes={
        from_the_first_layer: "The order is wrong: start with the last layer, and go back to the "
        "image.",
        strides_ignored: "The strides are missing: with stride 2, neighboring outputs are 2 inputs "
        "apart.",
        one_step_too_many: "Among n neighboring outputs there are n - 1 steps, not n.",
        product_of_the_sizes: "The sizes are multiplied. Neighboring patches overlap, so the field "
        "grows more slowly.",
    },
)


# 01.7: parameters and FLOPs of a convolution


def conv_cost(inputs, outputs, size, height, width):
    """(parameters, FLOPs for one image) of a convolution with a bias.

    `inputs` and `outputs`: channels. `size`: of the kernel. `height`, `width`: of the output.
    A multiplication and an addition are 2 FLOPs. The FLOPs leave out the bias.
    """
    weights = outputs * inputs * size * size
    return weights + outputs, 2 * weights * height * width


def without_bias(inputs, outputs, size, height, width):
    parameters, flops = conv_cost(inputs, outputs, size, height, width)
    return parameters - outputs, flops


def multiply_adds(inputs, outputs, size, height, width):
    parameters, flops = conv_cost(inputs, outputs, size, height, width)
    return parameters, flops // 2


def one_input_channel(inputs, outputs, size, height, width):
    return conv_cost(1, outputs, size, height, width)


def one_position(inputs, outputs, size, height, width):
    return conv_cost(inputs, outputs, size, 1, 1)


TASKS["01.7"] = Task(
    reference=conv_cost,
    inputs=lambda: [(3, 16, 3, 32, 32), (4, 8, 5, 10, 12)],
    hints=[
        "The weight has the shape (outputs, inputs, size, size). How many numbers is that? The "
        "bias is one more number for each output channel.",
        "Each weight is used once at each position of the output, in one multiplication and one "
        "addition.",
    ],
    mistakes={
        without_bias: "The bias is missing in the parameters: one number for each output channel.",
        multiply_adds: "You counted a multiplication and an addition as one. They are 2 FLOPs.",
        one_input_channel: "Each output channel has one kernel for each input channel.",
        one_position: "The kernel is used at all positions of the output, height x width.",
    },
)


# 01.8: the size of the output


def output_side(pixels, size, stride, padding):
    """Number of output values along one side of an image.

    The image has `pixels` pixels, and `padding` zeros are added at both ends. A kernel of `size`
    pixels moves by `stride` pixels as long as it fits.
    """
    return (pixels + 2 * padding - size) // stride + 1


def padding_at_one_end(pixels, size, stride, padding):
    return (pixels + padding - size) // stride + 1


def without_the_first_position(pixels, size, stride, padding):
    return (pixels + 2 * padding - size) // stride


def a_fraction(pixels, size, stride, padding):
    return (pixels + 2 * padding - size) / stride + 1


def stride_ignored(pixels, size, stride, padding):
    return pixels + 2 * padding - size + 1


TASKS["01.8"] = Task(
    reference=output_side,
    inputs=lambda: [(10, 3, 1, 2), (8, 3, 2, 0), (224, 7, 2, 3), (11, 3, 3, 0), (28, 5, 1, 0)],
    hints=[
        "Count the steps from the first position to the last. The first position comes on top.",
        "With its padding, the image is pixels + 2 * padding long. The kernel can move by this "
        "length minus its own size. A step that does not fit does not count: `//` rounds down.",
    ],
    mistakes={
        padding_at_one_end: "The padding is added at both ends.",
        without_the_first_position: "You counted the steps. There is one position more than steps.",
        a_fraction: "The result is not a whole number. A step that does not fit does not count.",
        stride_ignored: "The stride is missing: with stride 2, the kernel moves by 2 pixels.",
    },
)


# 01.9: repair a convolution with padding


def conv2d_same(image, kernel):
    """A convolution whose output is as large as the image, as nn.Conv2d with padding=K // 2.

    image (H, W), kernel (K, K), where K is odd. Returns (H, W).
    """
    size, (height, width) = len(kernel), image.shape
    pad = size // 2
    padded = torch.zeros(height + 2 * pad, width + 2 * pad)
    padded[pad : pad + height, pad : pad + width] = image
    output = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            patch = padded[y : y + size, x : x + size]
            output[y, x] = (patch * kernel).sum()
    return output


def odd_kernels():
    yield torch.randn(4, 5), torch.randn(3, 3)
    yield torch.randn(6, 6), torch.randn(5, 5)


def zeros_at_two_sides_only(image, kernel):
    pad = len(kernel) // 2
    return conv2d_loops(F.pad(image, (0, 2 * pad, 0, 2 * pad)), kernel)


def still_flipped(image, kernel):
    return conv2d_same(image, kernel.flip(0, 1))


def both_mistakes(image, kernel):
    return zeros_at_two_sides_only(image, kernel.flip(0, 1))


TASKS["01.9"] = Task(
    reference=conv2d_same,
    inputs=odd_kernels,
    hints=[
        "There are two mistakes. Try a kernel whose correct result you know: if only the middle "
        "weight is 1 and the others are 0, the output is the image.",
        "Print `padded` for an image of ones. Where are the zeros?",
        "Does nn.Conv2d flip the kernel? See the note after task 01.1.",
    ],
    mistakes={
        both_mistakes: "There are still two mistakes: one in `padded`, one in the product.",
        zeros_at_two_sides_only: "The zeros are at the right and at the bottom only. They must be "
        "around the image.",
        still_flipped: "The padding is right. But nn.Conv2d does not flip the kernel.",
    },
)


# 01.10: a convolution in few operations


def conv2d_shifts(image, kernel):
    """The same result as `conv2d_loops`, with at most 5 tensor operations for each weight.

    image (H, W), kernel (K, K). Returns (H - K + 1, W - K + 1).
    """
    size = len(kernel)
    rows, columns = image.shape[0] - size + 1, image.shape[1] - size + 1
    output = torch.zeros(rows, columns)
    for i in range(size):
        for j in range(size):
            output += kernel[i, j] * image[i : i + rows, j : j + columns]
    return output


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that compute; views (indexing, slicing) are free."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def run_and_count(function, image, kernel):
    """The output, and whether it took at most 5 operations for each weight."""
    with CountOperations() as counter:
        output = function(image, kernel)
    few = counter.count <= 5 * kernel.numel()
    if not torch.is_tensor(output):  # not written yet
        few = None
    return {"output": output, "few operations": few}


def large_images():
    yield torch.randn(12, 14), torch.randn(3, 3)
    yield torch.randn(10, 10), torch.randn(2, 2)


def loops_over_positions(image, kernel):
    return conv2d_loops(image, kernel)


def flipped_shifts(image, kernel):
    return conv2d_shifts(image, kernel.flip(0, 1))


def shifts_exchanged(image, kernel):
    return conv2d_shifts(image, kernel.T)


TASKS["01.10"] = Task(
    reference=conv2d_shifts,
    inputs=large_images,
    run=run_and_count,
    hints=[
        "Exchange the loops: first the two loops over the weights. What would the two loops over "
        "the positions do for one weight? A slice does it at once.",
        "Weight (0, 0) meets the pixels of rows 0 to H - K and columns 0 to W - K. Weight (i, j) "
        "meets the same rectangle, shifted down by i and to the right by j.",
        "Add one product for each weight: a number times a slice that has the shape of the output.",
    ],
    mistakes={
        loops_over_positions: "The result is right, but there is a loop over the positions. Let "
        "one operation work on all positions.",
        flipped_shifts: "The rectangles are shifted in the wrong direction, as if the kernel were "
        "flipped.",
        shifts_exchanged: "The two shifts are exchanged: i shifts the rows, j shifts the columns.",
    },
)
