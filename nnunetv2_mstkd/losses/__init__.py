"""Losses that two or more methods share: pure functions of tensors.

A term compares a student (missing modalities) with a teacher (all modalities), detaches the teacher itself, computes in
float32 outside autocast whatever it is given, and returns a float32 scalar. Nothing here reads a file, keeps a state or
knows a trainer. A tensor whose shape or type does not fit raises ValueError.

Losses of logits, here and in the methods, share these arguments:

student, teacher
    Logits (B, K, *spatial) of K classes (softmax, class 0 is the background) or K overlapping regions (sigmoid).
regions
    True for region heads, False for softmax classes.
label
    Regions (B, K, *spatial) of 0 and 1, or class numbers (B, 1, *spatial); of any type.
valid
    Bool (B, 1, *spatial): False at voxels to leave out (ignore label), whatever they contain. None: all are valid.
voxel_weight
    (B, 1, *spatial), at least 0: factor w of each voxel's difference. Denominators do not depend on it, so that
    distillation fades as fewer voxels ask for it. None is the factor 1.
"""
