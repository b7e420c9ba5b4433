"""The definition of right: each training method's forward and closed-form gradients in plain NumPy.

Written from the papers, for reading and for checking, not for speed. One module per method; `affine` is the grid
arithmetic they share. A backend is right when its codes equal these under its declared tie rule, and its gradients
equal these up to the rounding of float32 sums.
"""
