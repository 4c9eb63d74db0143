"The app in the browser: `python app.py`, then open the address that it prints. Works offline."
from draft_nb.demo import launch

if __name__=="__main__": launch()
