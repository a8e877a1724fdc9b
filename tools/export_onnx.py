"""Export a trained detector to ONNX; see --help."""
import sys
from pathlib import Path

# A script's own folder is on the path, a checkout's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_smallbn.cli.export_onnx import main  # noqa: E402

if __name__ == '__main__':
    main()
