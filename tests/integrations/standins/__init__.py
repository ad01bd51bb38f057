"""Models of other code bases as their descriptions have them: the names, state-dict keys, signatures and numbers of the
official classes, written anew, so that the drop-in is tested where none of them is installed."""
