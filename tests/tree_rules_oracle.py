# SPDX-License-Identifier: Apache-2.0
"""Exact (rational arithmetic) oracle for speculative tree/chain verification rules. V=4 toy model.
Run: python3 tree_rules_oracle.py   (about one second, no dependencies).  All rows are asserted.
The law of the first N output tokens of "one speculative step, completed with plain target sampling"
is compared with the target's law; tv==0 means lossless.  E = expected tokens of the step (incl. bonus).
"""
from fractions import Fraction as F
from itertools import product, permutations
from collections import defaultdict
import copy
V = 4
R20 = lambda xs: [F(x, 20) for x in xs]
P1 = [[12,5,2,1],[1,3,10,6],[4,4,9,3],[7,2,2,9]]; Q1 = [[4,8,5,3],[9,5,2,4],[3,10,1,6],[6,6,5,3]]
P2 = [[5,9,3,3],[12,2,1,5],[4,4,9,3]];            Q2 = [[10,4,2,4],[3,7,8,2],[1,2,12,5]]
p = {(): R20((8,6,4,2))}; q = {(): R20((5,1,6,8))}
for a in range(V):
    p[(a,)] = R20(P1[a]); q[(a,)] = R20(Q1[a])
    for b in range(V):
        p[(a,b)] = R20(P2[(a+b)%3]); q[(a,b)] = R20(Q2[(a+2*b)%3])
        for c in range(V): p[(a,b,c)] = R20(P1[(a+b+c)%4])

def norm(v):
    s = sum(v); return [x/s for x in v] if s else None
def residual(pp, qq):
    return norm([max(i-j, F(0)) for i, j in zip(pp, qq)]) or pp
def zero(v, x):
    return [F(0) if i == x else t for i, t in enumerate(v)]
def target(N):
    out = {}
    for s in product(range(V), repeat=N):
        w = F(1)
        for i in range(N): w *= p[s[:i]][s[i]]
        out[s] = w
    return out
def completed(d, N):
    out = defaultdict(F); st = list(d.items())
    while st:
        t, x = st.pop()
        if len(t) >= N: out[t[:N]] += x
        else: st += [(t+(v,), x*p[t][v]) for v in range(V)]
    return out
def tv(d, N=3):
    a, b = completed(d, N), target(N)
    assert sum(d.values()) == 1
    return sum(abs(a.get(k, 0)-b.get(k, 0)) for k in set(a)|set(b))/2
def elen(d): return sum(len(s)*w for s, w in d.items())

def draws(ctx, k, mode):                       # ordered sibling tuples with probability
    if mode == 'with':
        for c in product(range(V), repeat=k):
            w = F(1)
            for x in c: w *= q[ctx][x]
            yield list(c), w
    elif mode == 'without':
        for c in permutations(range(V), k):
            w = F(1); rem = F(1)
            for x in c: w *= q[ctx][x]/rem; rem -= q[ctx][x]
            yield list(c), w
    else:                                      # 'top': deterministic
        yield sorted(range(V), key=lambda x: -q[ctx][x])[:k], F(1)

def step(ks, mode, rule, order=None, extra=0, ctx=(), depth=0):
    """rule: 'keepq' | 'renormq' | 'onehot' | 'stale' (resample from p). extra=n: n fixed one-hot siblings after."""
    out = defaultdict(F)
    if depth == len(ks):
        for v in range(V): out[ctx+(v,)] += p[ctx][v]
        return out
    for c, w in draws(ctx, ks[depth], mode):
        if order: c = order(ctx, c)
        reach, pp, qq = w, p[ctx], q[ctx]
        det = [x for x in sorted(range(V), key=lambda x: (x*7+len(ctx)) % 5) if x not in c][:extra]
        for x, r in [(x, rule) for x in c]+[(x, 'onehot') for x in det]:
            acc = pp[x] if r == 'onehot' else min(F(1), pp[x]/qq[x]) if qq[x] else F(0)
            if acc:
                for s, y in step(ks, mode, rule, order, extra, ctx+(x,), depth+1).items(): out[s] += reach*acc*y
            reach *= 1-acc
            if not reach: break
            if r == 'onehot': pp = norm(zero(pp, x)) or pp
            elif r != 'stale':
                pp = residual(pp, qq)
                if r == 'renormq': qq = norm(zero(qq, x)) or qq
        for v in range(V):
            if reach*pp[v]: out[ctx+(v,)] += reach*pp[v]
    return out

def block(K):
    out = defaultdict(F)
    for s in product(range(V), repeat=K):
        w = F(1); pi = [F(1)]
        for i in range(K):
            w *= q[s[:i]][s[i]]; pi.append(min(pi[-1]*p[s[:i]][s[i]]/q[s[:i]][s[i]], F(1)))
        reach = w
        for i in range(K, -1, -1):
            c = s[:i]
            res = p[c] if i == K else [max(pi[i]*x-y, F(0)) for x, y in zip(p[c], q[c])]
            if i == 0: h = F(1)
            elif i == K: h = pi[K]
            else: R = sum(res); h = R/(R+1-pi[i]) if R+1-pi[i] else F(1)
            if reach*h:
                for v in range(V): out[c+(v,)] += reach*h*norm(res)[v]
            reach *= 1-h
    return out

def traversal(ks):
    def trees(ctx, d):
        if d == len(ks): yield (ctx, []), F(1); return
        for c, w in draws(ctx, ks[d], 'without'):
            for combo in product(*[list(trees(ctx+(x,), d+1)) for x in c]):
                ww = w
                for _, y in combo: ww *= y
                yield (ctx, [n for n, _ in combo]), ww
    def build(n): return dict(ctx=n[0], ch=[build(c) for c in n[1]], b=p[n[0]], s=q.get(n[0], [F(0)]*V))
    def setpa(n, pa):
        n['pa'] = pa
        for c in n['ch']:
            x = c['ctx'][-1]; setpa(c, min(pa*n['b'][x]/n['s'][x], F(1)) if n['s'][x] else F(0))
    out = defaultdict(F)
    def rec(root, wt):
        path = [root]
        while path[-1]['ch']: path.append(path[-1]['ch'][0])
        leaf = path[-1]
        for v in range(V):
            if leaf['pa']*leaf['b'][v]: out[leaf['ctx']+(v,)] += wt*leaf['pa']*leaf['b'][v]
        if leaf['pa'] == 1: return
        rej = wt*(1-leaf['pa']); root = copy.deepcopy(root); par = root
        for _ in range(len(path)-2): par = par['ch'][0]
        x = par['ch'].pop(0)['ctx'][-1]
        res = [max(par['pa']*i-j, F(0)) for i, j in zip(par['b'], par['s'])]; R = sum(res)
        pa = R/(R+1-par['pa']) if R+1-par['pa'] else F(1)
        par['b'] = norm(res) or [F(0)]*V; par['s'] = norm(zero(par['s'], x)) or [F(0)]*V
        setpa(par, pa); rec(root, rej)
    for t, w in trees((), 0):
        r = build(t); setpa(r, F(1)); rec(r, w)
    return out

def match(ks, ctx=(), depth=0):                # one draw s~p per node; follow child s, else emit s
    out = defaultdict(F)
    kids = next(draws(ctx, ks[depth], 'top'))[0] if depth < len(ks) else []
    for v in range(V):
        sub = match(ks, ctx+(v,), depth+1) if v in kids else {ctx+(v,): F(1)}
        for s, y in sub.items(): out[s] += p[ctx][v]*y
    return out

def kseq(k, rho=None):
    P, Q = p[()], q[()]
    beta = lambda r: float(sum(min(b, a/F(r)) for a, b in zip(P, Q)))
    if rho is None:
        lo, hi = 1.0, float(k)
        for _ in range(60):
            m = (lo+hi)/2
            if 1-(1-beta(m))**k <= m*beta(m): hi = m
            else: lo = m
        rho = hi
    return rho, 1-(1-beta(rho))**k

if __name__ == '__main__':
    byq = lambda c, l: sorted(l, key=lambda x: -q[c][x]); byid = lambda c, l: sorted(l)
    rows = [  # name, law, TV expected (None: just print), E expected
     ('chain K=2, token-wise', step([1,1],'with','keepq'), 0, 1.95),
     ('chain K=3, token-wise', step([1,1,1],'with','keepq'), 0, 2.1833),
     ('tree 2x2 with replacement, q kept', step([2,2],'with','keepq'), 0, 2.2033),
     ('tree 2x2 without replacement, q renormalised', step([2,2],'without','renormq'), 0, 2.3263),
     ('tree 3x2 without replacement, q renormalised', step([3,2],'without','renormq'), 0, 2.3906),
     ('tree 2x2 top-k, one-hot', step([2,2],'top','onehot'), 0, 1.415),
     ('tree 2x2 top-k, sample-then-match', match([2,2]), 0, 1.415),
     ('sampled chain K=2, one-hot rule', step([1,1],'with','onehot'), 0, 1.2637),
     ('sampled 2x2 w/o repl., one-hot rule', step([2,2],'without','onehot'), 0, 1.652),
     ('mixed: 1 sampled + 1 fixed one-hot sibling, 2 levels', step([1,1],'with','keepq',extra=1), 0, None),
     ('mixed: 2 sampled w/o repl. + 1 fixed sibling, 2 levels', step([2,2],'without','renormq',extra=1), 0, None),
     ('chain K=2, block', block(2), 0, 2.0), ('chain K=3, block', block(3), 0, 2.3196),
     ('tree 2x2 w/o repl., traversal', traversal([2,2]), 0, 2.3669), ('chain K=2, traversal', traversal([1,1]), 0, 2.0),
     ('WRONG w/o repl., q not renormalised', step([2,2],'without','keepq'), F(97,1680), None),
     ('WRONG with repl., q renormalised', step([2,2],'with','renormq'), F(20509,336000), None),
     ('WRONG with repl., duplicates dropped', step([2,2],'with','keepq',lambda c,l:list(dict.fromkeys(l))), F(739,21000), None),
     ('WRONG siblings sorted by q', step([2,2],'without','renormq',byq), F(5354743679,28868448000), None),
     ('WRONG siblings sorted by token id', step([2,2],'without','renormq',byid), F(1864221,7235200), None),
     ('WRONG top-k with p/q ratio', step([2,2],'top','renormq'), F(133,200), None),
     ('WRONG sampled chain, resample from p', step([1,1],'with','stale'), F(67,400), None),
     ('WRONG argmax chain, p/q, resample from p', step([1,1],'top','stale'), F(193,800), None)]
    for name, d, t, e in rows:
        x = tv(d); print(f'{name:58s} TV={str(x):>24s}  E={float(elen(d)):.4f}')
        assert x == t, (name, x); assert e is None or abs(float(elen(d))-e) < 1e-4, name
    assert dict(step([2,2],'top','onehot')) == dict(match([2,2])); nz = lambda d: {k: v for k, v in d.items() if v}
    assert nz(traversal([1,1])) == nz(block(2))                       # identical law incl. lengths
    for k, r, a in ((1,1,.6),(2,1.5,.75),(3,1.9337731,.7966887)):
        x = kseq(k); assert abs(x[0]-r) < 1e-6 and abs(x[1]-a) < 1e-6, x
    print('all asserted')
