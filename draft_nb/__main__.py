"`python -m draft_nb` is the command `draft-nb`."
import sys

from .cli import main

if __name__=="__main__": sys.exit(main())
