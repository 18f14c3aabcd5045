"""Is a method right?  Its attention block and the whole model on real ranks, against references that share no code.

reference   inputs and textbook attention over the whole sequence in float32, differentiated by autograd
ranks       the ranks of a verification: all of them, or rank 0 alone
block       one attention block over the ranks: output and gradients at full size, bytes sent
limits      which error passes, in float32 and in bfloat16
checks      the checks of one block: reference, recomputation, causality, permuted heads, bytes sent
train       loss and gradient norm of the whole model over three optimizer steps, against `single`
peaks       the peaks of a block, counted over fake tensors, against `costs`
rank        one rank of a verification: every check of one method at one shape
"""
