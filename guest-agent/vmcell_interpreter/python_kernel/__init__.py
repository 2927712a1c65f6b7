"""What runs inside Jupyter's kernels: their launch, and for Python's an IPython extension.

Nothing here imports matplotlib or pandas: a kernel that needs neither does not wait for them.

Reading order:
variables   environment variables for one run
frames      a DataFrame as columns of plain values
axes        what is drawn in one coordinate system, as a chart
figures     a figure as a chart, or several
extension   the formatters
launch      the kernels' processes
"""
