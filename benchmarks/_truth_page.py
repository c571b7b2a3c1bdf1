def write(r,f):
    pass
